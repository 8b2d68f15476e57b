# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What must be computed and read at the least, counted from the config, and RESULTS.md, which compares with it."""

from paddlemix.models.emu3.configuration_emu3 import Emu3Config
from paddlemix.utils import write_atomically

PARTS = ("vision-128", "vision-256", "vision-512", "draw-8", "draw-16", "draw-16-int8", "draw-16-int4")
# of a weight; of 4 bits with a scale for 128 of them, int8's scales are less than a hundredth
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5 + 4 / 128}
VISUAL_TOKENS = 32768
PROMPT, NEGATIVE_PROMPT = 24, 64  # text tokens; about what a short prompt and the released negative prompt have


def vision_operations(config, pixels):
    """Multiplications and additions of one frame of pixels x pixels, {"encode", "decode"}, from the config alone.

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


def drawing_bytes(config, height, width, dtype="float32"):
    """Bytes of a whole picture, step by step: row ends and closing tokens need no pass of their own."""
    mean_tokens = (PROMPT + NEGATIVE_PROMPT) / 2 + height * (width + 1) / 2
    return height * width * bytes_per_pass(config, mean_tokens, dtype=dtype)


# --- RESULTS.md ------------------------------------------------------------------------------------------


def sections(text):
    """{title: body} of a page's second-level headings; "" is what stands before them."""
    head, *parts = f"\n{text}".split("\n## ")
    return {"": head.strip("\n"), **{t: body.strip("\n") for t, _, body in (p.partition("\n") for p in parts)}}


def put_section(path, title, body):
    """Put a section into a page, in place of its earlier one or at the end."""
    parts = {**sections(path.read_text() if path.exists() else INTRODUCTION), title: body.strip("\n")}
    write_atomically(path, "\n\n".join(f"## {t}\n\n{b}" if t else b for t, b in parts.items()) + "\n")


HEADER = (
    "| | call | ours | transformers | times faster | ours, tokens/s | theirs | ours, peak | theirs | of theirs "
    "| the limit | ours reaches | theirs |\n" + "|---" * 13 + "|\n"
)


def table_row(name, row, limits):
    """A line of the table; what was not measured is a dash."""
    ours, peer = row.get("ours"), row.get("peer")
    needed, rate = ("operations", "operations_per_s") if "operations" in row else ("bytes", "read_bytes_per_s")
    least = row[needed] / max(limits[rate].values())
    tokens = row.get("tokens")
    each = [
        [
            f"{side['seconds']:.2f} s",
            f"{tokens / side['seconds']:.1f}" if tokens else "",
            f"{side['peak_bytes'] / 1e9:.2f} GB",
            f"{least / side['seconds']:.0%}",
        ]
        if side
        else ["-"] * 4
        for side in (ours, peer)
    ]
    seconds, speeds, peaks, shares = zip(*each, strict=True)
    faster = f"**{peer['seconds'] / ours['seconds']:.2f}**" if ours and peer else "-"
    memory = f"{ours['peak_bytes'] / peer['peak_bytes']:.0%}" if ours and peer else "-"
    cells = [name, row["when"], *seconds, faster, *speeds, *peaks, memory, f"{least:.2f} s", *shares]
    return "| " + " | ".join(cells) + " |\n"


def name_of(part, work):
    kind, size, *dtype = part.split("-")
    return f"{size} x {size} pixels, {work}" if kind == "vision" else ", ".join([f"{size} x {size} tokens", *dtype])


def summary(part, result):
    rows = "".join(table_row(name_of(part, row["work"]), row, result["limits"]) for row in result["rows"])
    return f"{HEADER}{rows}{verdict(part, result)}"


INTRODUCTION = """# Results of `make bench`

Written by `benchmarks/bench.py`; its head tells how to run it. On a CPU, in float32 where no other type is named; the
same random weights, cores and threads for both; every measurement in a process of its own, which is read to its peak by
the operating system's count.
"""


def report(results):
    """RESULTS.md, from the newest result of each part."""
    results = {part: results[part] for part in PARTS if part in results}
    text = INTRODUCTION
    for title, kind, explanation in SECTIONS:
        parts = {part: r for part, r in results.items() if part.startswith(kind)}
        text += f"\n## {title}\n\n{HEADER}"
        text += "".join(
            table_row(name_of(part, row["work"]), row, r["limits"]) for part, r in parts.items() for row in r["rows"]
        )
        text += f"\n{explanation}\n\n"
        text += "".join(f"- {verdict(part, r)}\n" for part, r in parts.items())
    text += "\n## Machine\n\n"
    machines = {}
    for part, result in results.items():
        machines.setdefault(machine_of(result), []).append(part)
    text += "".join(f"- {', '.join(parts)}: {machine}.\n" for machine, parts in machines.items())
    return text + gpu_arithmetic(Emu3Config())


def machine_of(result):
    m = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in {"Python": m["python"], **result["versions"]}.items())
    rates = [f"{k} {v / 1e9:.1f} GB/s" for k, v in result["limits"]["read_bytes_per_s"].items()]
    rates += [f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in result["limits"]["operations_per_s"].items()]
    return (
        f"commit {m['commit']}, {m['date']}; {m['cpu']}, {m['cores']} cores, {m['instructions']}, {m['memory_gb']} GB, "
        f"{m['system']}; {versions}. Limits: {', '.join(rates)}"
    )


def verdict(part, result):
    return f"{part}: {'equal' if result['equal'] else '**NOT EQUAL**'}: {'; '.join(result['checks'])}"


SECTIONS = (
    (
        "Vision tokenizer, the released size (0.27 billion parameters)",
        "vision",
        """\
First call: for ours as runs of `autoencode.py` tell it (median of two), for transformers the first call in its process;
loading is not in it. The limit: the operations of one frame at the best rate measured for a float32 matrix product or
convolution; of those that follow a doubling, 4 of 9 products. Ours takes 4 of 9 products of most other 3 x 3
convolutions, too (Winograd's filtering), so that it may go beyond this limit. transformers computes four equal
frames.""",
    ),
    (
        "Drawing with guidance: hidden 1024 x 8 layers over the real vocabulary",
        "draw",
        """\
Greedy. Tokens are those from the first visual token to the end of sequence. The limit is that of drawing step by step:
for each visual token the layers' weights, the visual rows of the head and the keys and values, at the best rate of
reading 1 GiB. The peaks are those of memory in use, mapped files included. int8 and int4 are ours alone, beside
transformers in float32: their tokens are not float32's, so that equality with transformers is checked in float32.""",
    ),
)


def gpu_arithmetic(config, side=90, read_per_s=3.35e12, operations_per_s=989e12):
    """What an H100 SXM should reach with the released model, from sizes alone."""
    tokens = (PROMPT + NEGATIVE_PROMPT) / 2 + side * (side + 1) / 2
    parameters = layer_weights(config) + 2 * config.vocab_size * config.hidden_size
    layers, head = 2 * layer_weights(config), 2 * VISUAL_TOKENS * config.hidden_size  # bytes
    read = bytes_per_pass(config, tokens, dtype="bfloat16")
    seconds = read / read_per_s
    rows = "".join(f"| {k} | {k / seconds:.0f} | {side**2 / k * seconds:.1f} s |\n" for k in (1, 2, 3, 4))
    return f"""
## GPU: not run

No GPU was at hand. **This is arithmetic, not measurement.** The released model of {parameters / 1e9:.2f} billion
parameters in bfloat16, one picture of {side} x {side} codes with guidance (two rows of a batch), on an H100 SXM that
reads {read_per_s / 1e12} TB/s: a step reads {layers / 1e9:.2f} GB of layers, {head / 1e9:.2f} GB of the head (its
visual rows) and on average {(read - layers - head) / 1e9:.2f} GB of keys and values, {read / 1e9:.2f} GB in
all, which takes {1e3 * seconds:.1f} ms at the least.

| codes accepted a pass | codes a second at most | a picture at the least |
|---|---|---|
{rows}
A pass over a window of guesses reads hardly more than a step; its products take less time than its reading up to a
window of about {seconds * operations_per_s / (2 * (layers + head)):.0f} codes ({operations_per_s / 1e12:.0f} TFLOP/s).

A step is ready to be recorded as a CUDA graph (fixed shapes and addresses, the position a tensor on the device, the
cache written in place, nothing that waits), which `tests/test_step.py` shows on a CPU; it is not recorded yet, so that
Python's time to launch a step's kernels comes on top where the card is faster. Sampling's noise is made on the host, as
a seed must give the same picture everywhere, and copied from pinned memory without waiting.
"""
