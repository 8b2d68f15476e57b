# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How many bytes a checkpoint takes, worked out from its config.json: nothing is loaded."""

import math

from .configuration_emu3 import QUANTIZATIONS

LOGITS = 1 << 26  # that are in memory at once in training, float32
PROMPT = 64  # tokens, about what a prompt takes


def linear_shapes(config):
    """[out, in] of every linear layer of the language model, its head last."""
    hidden, middle, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads * dim, config.num_key_value_heads * dim
    layer = [(heads, hidden), (kv_heads, hidden), (kv_heads, hidden), (hidden, heads)]
    layer += [(middle, hidden), (middle, hidden), (hidden, middle)]
    return [*layer * config.num_hidden_layers, (config.vocab_size, hidden)]


def parameters(config):
    """Of the language model; a head that is the embedding counts once."""
    linear, other = _parts(config)
    return linear + other


def step_parameters(config):
    """What one new token reads of the language model: its linear layers."""
    return sum(math.prod(shape) for shape in linear_shapes(config))


def weight_bytes(config, dtype):
    """Of the language model in memory, loaded in a dtype."""
    linear, other = _parts(config)
    if dtype not in ("int8", "int4"):
        return (linear + other) * (4 if dtype == "float32" else 2)
    quantized = 0
    for outputs, inputs in linear_shapes(config):
        group = QUANTIZATIONS["int4"]["group_size"]  # inputs that share a scale
        quantized += outputs * (inputs + 4 if dtype == "int8" else math.ceil(inputs / group) * (group // 2 + 4))
    return quantized + other * 2  # the embedding stays in 16 bits; the norms are little


def adapter_parameters(config, rank):
    """Of LoRA beside all linear layers but the head."""
    return rank * sum(map(sum, linear_shapes(config)[:-1]))


def training_bytes(config, dtype, tokens, rank=0, recompute=False, processes=1, activation=4, lora_dropout=0):
    """What training takes, by part: {"weights", "optimizer", "activations", "head"}; about right, not to the byte.

    Args:
        dtype: of the weights.
        tokens: of a forward pass, padding included.
        rank: of LoRA; 0 trains all weights.
        recompute: of activations, layer by layer.
        processes: that share gradients, moments and masters.
        activation: bytes of a number; 4 on a CPU. The counts were measured there.
        lora_dropout: of LoRA.
    """
    trained = adapter_parameters(config, rank) if rank else parameters(config)
    state = 12 if rank or dtype == "float32" else 16  # a gradient, two moments, and of 16 bits a master; float32
    hidden, middle = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    layer, layers = 8 * hidden + 3 * middle + 4 * keys, config.num_hidden_layers  # numbers that wait for the gradient
    kept = layers * hidden + 13 * hidden + 5 * middle + 2 * keys if recompute else layers * layer + 11 * hidden
    # LoRA keeps its float32 copy of what each projection takes, where that is of 16 bits or has a dropout with a mask
    copied = 5 if lora_dropout else 4 if activation < 4 else 0  # bytes of a number
    kept += copied * (6 * hidden + middle) * (1 if recompute else layers) // activation if rank else 0
    masks = 2 * hidden * (1 if recompute else layers) if config.attention_dropout else 0  # of dropout, a byte a number
    logits = 4 * min(LOGITS, tokens * config.vocab_size)
    return {
        "weights": weight_bytes(config, dtype),
        "optimizer": trained * state // processes,
        "activations": tokens * (kept * activation + masks),
        "head": logits,
    }


def picture_tokens(config, factor=8):
    """(side in pixels, tokens with a prompt) of the picture that the checkpoint draws by itself."""
    side = math.isqrt(config.image_area) // factor
    return side * factor, PROMPT + side * (side + 1) + 3


def vision_bytes(config, pixels):
    """(weights, features while a picture is decoded) of the vision tokenizer in float32."""
    import paddle

    from .modeling_emu3visionvq import Emu3VisionVQModel, feature_bytes

    with paddle.LazyGuard():  # no weight is made
        model = Emu3VisionVQModel(config)
    weights = sum(4 * math.prod(tensor.shape) for tensor in model.state_dict().values())
    return weights, feature_bytes(config, pixels, with_engine=paddle.get_device() == "cpu")


def _parts(config):
    linear = step_parameters(config)
    embedding = config.vocab_size * config.hidden_size
    if config.tie_word_embeddings:
        linear -= embedding
    return linear, embedding + (2 * config.num_hidden_layers + 1) * config.hidden_size
