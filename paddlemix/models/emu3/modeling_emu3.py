# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model: token ids to logits. One causal Transformer, one attention, one KV cache.

A Llama-style decoder (Emu3: arXiv 2409.18869, section 2.3): RMSNorm before each block, rotary positions,
grouped-query attention, SwiGLU. Parameter names are the released checkpoint's.
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.functional.flash_attention import flash_attention
from paddlenlp.generation import GenerationConfig, GenerationMixin
from paddlenlp.transformers.model_outputs import CausalLMOutputWithPast

from paddlemix.utils import InputError

from .checkpoint import CheckpointMixin, require_memory
from .configuration_emu3 import Emu3Config

QUERY_CHUNK = 512  # queries a time of the plain attention: never a whole [length, length] matrix


class KVCache:
    """Keys and values of every layer, of fixed size, written in place. `length` tokens are in it."""

    def __init__(self, config, batch_size, max_length, dtype="float32"):
        shape = [batch_size, max_length, config.num_key_value_heads, config.head_dim]
        itemsize = 4 if dtype in ("float32", paddle.float32) else 2
        require_memory(
            2 * config.num_hidden_layers * math.prod(shape) * itemsize,
            f"for the keys and values of {batch_size * max_length} tokens",
        )
        self.keys = [paddle.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [paddle.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length = 0

    @property
    def max_length(self):
        return self.keys[0].shape[1]

    def write(self, layer, key, value):
        """Append keys and values [batch, new, kv_heads, head_dim]; give all so far [batch, length + new, ...]."""
        end = self.length + key.shape[1]
        self.keys[layer][:, self.length : end] = key
        self.values[layer][:, self.length : end] = value
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    def map(self, function):
        """A cache of the tensors that `function` makes of this one's."""
        other = object.__new__(KVCache)
        other.keys, other.values = [function(k) for k in self.keys], [function(v) for v in self.values]
        other.length = self.length
        return other


def rotary_cos_sin(config, position_ids, length):
    """Cosines and sines of the rotary positions (Su et al., arXiv 2104.09864), float32 [B, new, 1, head_dim].

    `length` tokens in all decide the base of the dynamic (NTK-aware) scaling.
    """
    base, dim = config.rope_theta, config.head_dim
    scaling = config.rope_scaling or {}
    positions = position_ids.astype("float32")
    if scaling.get("type") == "linear":
        positions = positions / scaling["factor"]
    elif scaling.get("type") == "dynamic" and length > config.max_position_embeddings:
        stretch = scaling["factor"] * length / config.max_position_embeddings - (scaling["factor"] - 1)
        base = base * stretch ** (dim / (dim - 2))
    inverse = 1.0 / paddle.pow(paddle.to_tensor(base, "float32"), paddle.arange(0, dim, 2, dtype="float32") / dim)
    angles = positions.unsqueeze(-1) * inverse
    angles = paddle.concat([angles, angles], axis=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn pairs (i, i + head_dim / 2) of x [batch, new, heads, head_dim] by their angles."""
    first, second = x.chunk(2, axis=-1)
    return x * cos.astype(x.dtype) + paddle.concat([-second, first], axis=-1) * sin.astype(x.dtype)


def attend(query, key, value, allowed=None, dropout=0.0):
    """Causal grouped-query attention; the last query sees the last key.

    Args:
        query: [batch, new, heads, head_dim]
        key, value: [batch, length, kv_heads, head_dim], length >= new
        allowed: bool [batch, length], False at keys that nobody may see; None where all may be seen.
        dropout: of the attention probabilities.

    Returns:
        [batch, new, heads * head_dim]
    """
    batch, new, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    if allowed is None and new in (1, length) and _has_flash_attention(query):
        out, _ = flash_attention(query, key, value, dropout=dropout, causal=new > 1, training=dropout > 0)
        return out.reshape([batch, new, heads * head_dim])

    # queries that share a key head stand side by side, so that a key is read once for all of them
    query = query.reshape([batch, new, kv_heads, heads // kv_heads, head_dim]).transpose([0, 2, 3, 1, 4])
    key, value = key.transpose([0, 2, 1, 3]), value.transpose([0, 2, 1, 3])
    out = [
        _attend_chunk(query[:, :, :, start : start + QUERY_CHUNK], key, value, length - new + start, allowed, dropout)
        for start in range(0, new, QUERY_CHUNK)
    ]
    out = out[0] if len(out) == 1 else paddle.concat(out, axis=3)
    return out.transpose([0, 3, 1, 2, 4]).reshape([batch, new, heads * head_dim])


def _attend_chunk(query, key, value, past, allowed, dropout):
    """query [batch, kv_heads, group, new, head_dim] at positions from `past` on, key and value [batch, kv_heads,
    length, head_dim]"""
    batch, kv_heads, group, new, head_dim = query.shape
    length = past + new  # later keys are nobody's in this chunk
    key, value = key[:, :, :length], value[:, :, :length]
    query = query.reshape([batch, kv_heads, group * new, head_dim]) / math.sqrt(head_dim)
    scores = paddle.matmul(query, key, transpose_y=True)
    scores = scores.astype("float32").reshape([batch, kv_heads, group, new, length])
    visible = _visible(new, length, None if allowed is None else allowed[:, :length])
    if visible is not None:  # a finite number: where a query sees nothing, it must not make NaN
        scores = paddle.where(visible, scores, -1e30)
    weights = F.dropout(F.softmax(scores, axis=-1), dropout, training=dropout > 0).astype(value.dtype)
    out = paddle.matmul(weights.reshape([batch, kv_heads, group * new, length]), value)
    return out.reshape([batch, kv_heads, group, new, head_dim])


def _visible(new, length, allowed):
    """Which keys the last `new` queries may see, bool [batch or 1, 1, 1, new, length]; None where all see all."""
    if new == 1 and allowed is None:
        return None
    visible = paddle.arange(length) <= paddle.arange(length - new, length).unsqueeze(-1)
    visible = visible.reshape([1, 1, 1, new, length])
    return visible if allowed is None else paddle.logical_and(visible, allowed.reshape([-1, 1, 1, 1, length]))


def _has_flash_attention(query):
    """Flash attention 2 takes 16 bits, heads of at most 256, and a card of compute capability 8.0 or more."""
    if not query.place.is_gpu_place() or query.dtype not in (paddle.float16, paddle.bfloat16):
        return False
    return query.shape[-1] <= 256 and paddle.device.cuda.get_device_capability()[0] >= 8


def linear(x, weight):
    """x [..., in] times weight [out, in] -> [..., out]"""
    rows = math.prod(x.shape[:-1])
    if 1 < rows <= 4 and x.place.is_cpu_place():
        # Paddle's matmul reads the weight twice as fast when it comes first, and few rows are bound by that
        return paddle.matmul(weight, x.reshape([rows, -1]), transpose_y=True).T.reshape([*x.shape[:-1], -1])
    return paddle.matmul(x, weight, transpose_y=True)


class Emu3Linear(nn.Layer):
    """A linear layer without bias whose weight is [out, in], as in the checkpoint."""

    def __init__(self, config, in_features, out_features):
        super().__init__()
        self.weight = self.create_parameter([out_features, in_features], attr=_normal(config))

    def forward(self, x):
        return linear(x, self.weight)


class Emu3RMSNorm(nn.Layer):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = self.create_parameter([hidden_size], default_initializer=nn.initializer.Constant(1.0))
        self.eps = eps

    def forward(self, x):
        h = x.astype("float32")
        h = h * paddle.rsqrt((h * h).mean(axis=-1, keepdim=True) + self.eps)
        return self.weight * h.astype(x.dtype)


class Emu3Attention(nn.Layer):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.config = layer, config
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Emu3Linear(config, config.hidden_size, heads * dim)
        self.k_proj = Emu3Linear(config, config.hidden_size, kv_heads * dim)
        self.v_proj = Emu3Linear(config, config.hidden_size, kv_heads * dim)
        self.o_proj = Emu3Linear(config, heads * dim, config.hidden_size)

    def forward(self, x, cos, sin, allowed, cache):
        by_head = [*x.shape[:2], -1, self.config.head_dim]
        query = rotate(self.q_proj(x).reshape(by_head), cos, sin)
        key = rotate(self.k_proj(x).reshape(by_head), cos, sin)
        value = self.v_proj(x).reshape(by_head)
        if cache is not None:
            key, value = cache.write(self.layer, key, value)
        dropout = self.config.attention_dropout if self.training else 0.0
        return self.o_proj(attend(query, key, value, allowed, dropout))


class Emu3MLP(nn.Layer):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Emu3Linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = Emu3Linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = Emu3Linear(config, config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Emu3DecoderLayer(nn.Layer):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Emu3Attention(config, layer)
        self.mlp = Emu3MLP(config)
        self.input_layernorm = Emu3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Emu3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, allowed=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, allowed, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Emu3Model(CheckpointMixin, nn.Layer):
    """The Transformer without its head: token ids to hidden states."""

    config_class = Emu3Config

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, weight_attr=_normal(config))
        self.layers = nn.LayerList([Emu3DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Emu3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.enable_recompute = False  # PaddleNLP's name for gradient checkpointing; its Trainer sets it

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None):
        """Hidden states after the last norm.

        Args:
            input_ids: int64 [batch, new]; or inputs_embeds [batch, new, hidden_size] in their place.
            attention_mask: [batch, length] with 0 at padding, length counting the cached tokens too; or
                PaddleNLP's additive [batch, 1, 1 or new, length] with 0 where a token may be seen.
            position_ids: int64 [batch, new]. Left out, they count the tokens that are not padding.
            past_key_values: a KVCache, which the new tokens are added to.

        Returns:
            [batch, new, hidden_size]
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give input_ids or inputs_embeds, one of the two")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, new = x.shape[:2]
        past = 0 if past_key_values is None else past_key_values.length
        length = past + new
        if past_key_values is not None and length > past_key_values.max_length:
            raise InputError(
                f"{length} tokens do not fit a cache of {past_key_values.max_length}: make a larger KVCache"
            )
        allowed = _allowed_keys(attention_mask, batch, length)
        if position_ids is None:
            position_ids = _positions(allowed, past, length, batch)
        cos, sin = rotary_cos_sin(self.config, position_ids, length)
        for layer in self.layers:
            if self.enable_recompute and self.training and past_key_values is None:
                x = paddle.distributed.fleet.utils.recompute(layer, x, cos, sin, allowed)
            else:
                x = layer(x, cos, sin, allowed, past_key_values)
        if past_key_values is not None:
            past_key_values.length = length
        return self.norm(x)


def _allowed_keys(attention_mask, batch, length):
    """bool [batch, length], or None where nothing is masked."""
    if attention_mask is None:
        return None
    if attention_mask.ndim == 4:  # PaddleNLP's additive mask: the last query's row tells the padding
        attention_mask = attention_mask[:, 0, -1] > -1.0
    allowed = attention_mask.astype("bool")
    if allowed.shape != [batch, length]:
        raise InputError(
            f"attention_mask must be [batch, cached + new tokens] = [{batch}, {length}], got {list(allowed.shape)}"
        )
    return allowed


def _positions(allowed, past, length, batch):
    """Positions of the new tokens: their number among the tokens that are not padding, and 1 at padding."""
    if allowed is None:
        return paddle.arange(past, length).unsqueeze(0).expand([batch, -1])
    positions = allowed.astype("int64").cumsum(axis=-1) - 1
    return paddle.where(allowed, positions, paddle.ones_like(positions))[:, past:]


class Emu3ForCausalLM(CheckpointMixin, GenerationMixin, nn.Layer):
    """The Transformer with its head. PaddleNLP's `generate` works on it; `generate_images` and
    `generate_text` in generation_emu3.py are the faster way."""

    config_class = Emu3Config

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Emu3Model(config)
        self.lm_head = Emu3Linear(config, config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.generation_config = GenerationConfig(
            pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
        )

    @property
    def tied_weights(self):
        return ("lm_head.weight",) if self.config.tie_word_embeddings else ()

    @property
    def dtype(self):
        return self.model.dtype

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def gradient_checkpointing_enable(self):
        """Recompute each layer's activations in the backward pass, to train in less memory."""
        self.model.enable_recompute = True

    recompute_enable = gradient_checkpointing_enable  # PaddleNLP's name

    def make_cache(self, batch_size, max_length):
        """An empty KVCache for `max_length` tokens in this model's dtype."""
        return KVCache(self.config, batch_size, max_length, self.dtype)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=True,
    ):
        """Logits, and the loss where labels are given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds: as Emu3Model takes them.
            labels: int64 [batch, new]; position i is predicted from the tokens before it; -100 is left out.
            use_cache: make a cache where none is given, and give it back (config.use_cache if None, but not
                in training).
            logits_to_keep: compute logits only for so many last positions; 0 for all.
            return_dict: False gives a plain tuple of what is not None.

        Returns:
            loss (float32, mean over labels that count), logits [batch, positions, vocab_size], past_key_values.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if use_cache and past_key_values is None:
            batch, new = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
            past_key_values = self.make_cache(batch, new)
        hidden_states = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        logits = self.lm_head(hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states)
        loss = None if labels is None else _next_token_loss(logits, labels)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output if return_dict else output.to_tuple()

    # --- what PaddleNLP's generate calls

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, use_cache=True, **kwargs
    ):
        past = 0
        if use_cache:
            past_key_values = self._cache_with_room(past_key_values, *input_ids.shape)
            past = past_key_values.length
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = attention_mask[:, 0, -1] > -1.0
        return {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "position_ids": None if position_ids is None else position_ids[:, past:],
            "past_key_values": past_key_values if use_cache else None,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _cache_with_room(self, cache, batch_size, length):
        """`generate` does not say how far it will go: start with room for half as much again, then double."""
        if cache is None:
            return self.make_cache(batch_size, length + max(64, length // 2))
        if length <= cache.max_length:
            return cache
        return cache.map(lambda x: paddle.concat([x, paddle.zeros_like(x)], axis=1))

    @staticmethod
    def update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False):
        model_kwargs["past_key_values"] = outputs.past_key_values
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            if mask.ndim == 4:
                mask = mask[:, 0, -1] > -1.0
            mask = mask.astype("int64")
            model_kwargs["attention_mask"] = paddle.concat([mask, paddle.ones_like(mask[:, :1])], axis=-1)
        positions = model_kwargs.get("position_ids")
        if positions is not None:
            model_kwargs["position_ids"] = paddle.concat([positions, positions[:, -1:] + 1], axis=-1)
        return model_kwargs

    def get_logits_processor(self, logits_processors=None, **kwargs):
        # PaddleNLP 3.0.0b3 iterates over its LogitsProcessorList here, which cannot be iterated
        processors = super().get_logits_processor(**kwargs)
        for processor in logits_processors._processors.values() if logits_processors is not None else ():
            processors.append(processor)
        return processors

    def reorder_cache(self, cache, beam_idx):
        return None if cache is None else cache.map(lambda x: x.index_select(beam_idx))


def _next_token_loss(logits, labels):
    """Mean cross entropy of the labels that are not -100, in float32 of their rows alone."""
    labels = labels[:, 1:].flatten()
    rows = (labels != -100).nonzero().flatten()
    logits = logits[:, :-1].flatten(0, 1).index_select(rows).astype("float32")
    return F.cross_entropy(logits, labels.index_select(rows))


def _normal(config):
    return nn.initializer.Normal(0.0, config.initializer_range)
