# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What must be computed and read at the least, counted from the config."""

# of a weight; of 4 bits with a scale for 128 of them, int8's scales are less than a hundredth
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5 + 4 / 128}
VISUAL_TOKENS = 32768
FIRST_VISUAL = 151854  # id of the first of them
PROMPT, NEGATIVE_PROMPT = 24, 64  # text tokens; about what a short prompt and the released negative prompt have


def vision_operations(config, pixels):
    """Multiplications and additions of one frame of pixels x pixels, {"encode", "decode"}, from the config.

    Convolutions and attention as the architecture has them. Left out as less than a hundredth: the temporal layers
    of 4 channels, the spatial norms' 1x1 convolutions and the search in the codebook.
    """

    def conv(inputs, outputs, side, kernel=3):
        return 2 * inputs * outputs * kernel**2 * side**2

    def resnet(inputs, outputs, side):
        shortcut = conv(inputs, outputs, side, 1) if inputs != outputs else 0
        return conv(inputs, outputs, side) + conv(outputs, outputs, side) + shortcut

    def attention(channels, side):  # four 1x1 convolutions and two products over all pairs of positions
        return 4 * conv(channels, channels, side, 1) + 4 * channels * side**4

    def level(i, inputs, blocks):
        side, outputs = pixels >> i, config.ch * config.ch_mult[i]
        sizes = [inputs] + [outputs] * blocks
        operations = sum(resnet(a, b, side) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        return operations + (blocks * attention(outputs, side) if i in config.attn_resolutions else 0)

    channels = [config.ch * m for m in config.ch_mult]
    last = len(channels) - 1
    small = pixels >> last
    middle = 2 * resnet(channels[-1], channels[-1], small) + attention(channels[-1], small)
    encode = conv(config.in_channels, config.ch, pixels) + middle + conv(channels[-1], config.z_channels, small)
    decode = conv(config.z_channels, channels[-1], small) + middle + conv(channels[0], config.out_channels, pixels)
    for i, outputs in enumerate(channels):
        encode += level(i, channels[i - 1] if i else config.ch, config.num_res_blocks)
        decode += level(i, channels[min(i + 1, last)], config.num_res_blocks + 1)
        if i < last:
            encode += conv(outputs, outputs, pixels >> (i + 1))  # downsampling
        if i:
            decode += conv(outputs, outputs, pixels >> (i - 1)) * 4 // 9  # upsampling: of 9 pixels 4 are different
    return {"encode": encode, "decode": decode}


def layer_weights(config):
    """Weights that every pass reads whatever the head: all layers and the last norm."""
    kv = config.num_key_value_heads * config.head_dim
    attention = 2 * config.hidden_size * (config.hidden_size + kv)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp + 2 * config.hidden_size) + config.hidden_size


def bytes_per_pass(config, tokens, rows=2, dtype="float32"):
    """Bytes that a step must read: layers, the visual rows of the head, keys and values of `rows` x `tokens`, which
    are of 16 bits where the weights are not float32."""
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache = rows * tokens * kv * (4 if dtype == "float32" else 2)
    return WEIGHT_BYTES[dtype] * (layer_weights(config) + VISUAL_TOKENS * config.hidden_size) + cache


def image_bytes(config, height, width, dtype="float32"):
    """Bytes of a whole image, step by step: row ends and closing tokens need no pass of their own."""
    mean_tokens = (PROMPT + NEGATIVE_PROMPT) / 2 + height * (width + 1) / 2
    return height * width * bytes_per_pass(config, mean_tokens, dtype=dtype)


def gpu_arithmetic(config, side=90, read_per_s=3.35e12, operations_per_s=989e12):
    """What an H100 SXM should reach with the released model, by its sizes: columns, rows and text of a section."""
    tokens = (PROMPT + NEGATIVE_PROMPT) / 2 + side * (side + 1) / 2
    parameters = layer_weights(config) + 2 * config.vocab_size * config.hidden_size
    layers, head = 2 * layer_weights(config), 2 * VISUAL_TOKENS * config.hidden_size  # bytes
    read = bytes_per_pass(config, tokens, dtype="bfloat16")
    seconds = read / read_per_s
    heads = ["codes accepted a pass", "codes a second at most", "an image at the least"]
    rows = [[f"{k}", f"{k / seconds:.0f}", f"{side**2 / k * seconds:.1f} s"] for k in (1, 2, 3, 4)]
    text = f"""\
**This is arithmetic, not measurement.** The released model of {parameters / 1e9:.2f} billion
parameters in bfloat16, one image of {side} x {side} codes with guidance (two rows of a batch), on an H100 SXM that
reads {read_per_s / 1e12} TB/s: a step reads {layers / 1e9:.2f} GB of layers, {head / 1e9:.2f} GB of the head (its
visual rows) and on average {(read - layers - head) / 1e9:.2f} GB of keys and values, {read / 1e9:.2f} GB in
all, which takes {1e3 * seconds:.1f} ms at the least.

A pass over a window of guesses reads hardly more than a step; its products take less time than its reading up to a
window of about {seconds * operations_per_s / (2 * (layers + head)):.0f} codes ({operations_per_s / 1e12:.0f} TFLOP/s).

A step is recorded as a CUDA graph (fixed shapes and addresses, the position a tensor on the device, the cache written
in place, nothing that waits), which was tried with stand-ins on a CPU only. Without it Python's time to launch a step's
kernels comes on top where the card is faster. Sampling's noise is made on the host, as
a seed must give the same image everywhere, and copied from pinned memory without waiting.
"""
    return heads, rows, text
