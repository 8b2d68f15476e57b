# Licensed under the Apache License, Version 2.0; see LICENSE.
"""This project and Hugging Face transformers side by side: the same weights, the same results, seconds and memory.

The weights are random, in the released layout, and are written once (3 GB). Ours is measured before and after the peer,
on the same cores. Fails where the two sides differ by more than rounding.
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
from counts import FIRST_VISUAL, NEGATIVE_PROMPT, PROMPT, VISUAL_TOKENS, gpu_arithmetic, image_bytes, vision_operations
from equality import compare_codes, compare_pixels, compare_tokens
from machine import describe
from measure import PEER, ROOT, call
from measure import run as run_command

from paddlemix.models.emu3.configuration_emu3 import Emu3Config, Emu3VisionVQConfig

HAS_PEER = True
PARTS = ("vision-128", "vision-256", "vision-512", "generate-8", "generate-16", "generate-16-int8", "generate-16-int4")
QUICK = ("vision-128", "generate-8")
SMALL = ("vision-64", "generate-4", "generate-4-int8")
GUIDANCE_SCALE = 3.0
LANGUAGE_CONFIG = {
    "model_type": "Emu3", "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "torch_dtype": "float32",
}  # fmt: skip
VISION_CONFIG = {"model_type": "Emu3VisionVQ", "torch_dtype": "float32"}  # the released sizes

VISION = "Vision tokenizer, the released size (0.27 billion parameters)"
VISION_TEXT = """\
First call: for ours as runs of `autoencode.py` report it (median of two), for transformers the first call in its
process; loading is not included. The limit: the operations of one frame at the best rate measured for a float32 matrix
product or convolution; after an upsampling, 4 of 9 products. Ours needs a quarter of the products of most other
3 x 3 convolutions (Winograd's filtering), so that it can pass this limit. transformers computes four equal frames.
"""
GENERATION = "Text-to-image with guidance, hidden 1024 x 8 layers over the real vocabulary"
GENERATION_TEXT = """\
Greedy. Tokens are counted from the first visual token to the end of sequence. The limit is that of sequential decoding:
for each visual token the layers' weights, the visual rows of the head and the keys and values, at the best rate of
reading 1 GiB. The peaks are those of memory in use, mapped files included. int8 and int4 are ours only, beside
transformers in float32: their tokens are not float32's, so that equality with transformers is checked in float32.
"""


def add_arguments(parser):
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help=" ".join(QUICK))
    parser.add_argument("--peer_warm", type=int, default=1, help="calls of the peer after the first")
    parser.add_argument("--warm", type=int, default=2, help="calls of ours after the first, in each process")
    parser.add_argument("--decoding", default="step", help="of ours, as in generate_images")


def run(args, page):
    call(args, "ours", "compare.write_checkpoints", directory=args.directory / "checkpoints", small=args.small)
    rates = [call(args, side, "measure.limits") for side in sides(args)]
    versions = {name: version for r in rates for name, version in r.pop("versions").items()}
    limits = {kind: {name: rate for r in rates for name, rate in r[kind].items()} for kind in rates[0]}
    page.put("A GPU, by arithmetic", *gpu_arithmetic(Emu3Config()))
    for part in SMALL if args.small else QUICK if args.quick else args.parts:
        kind, size, *dtype = part.split("-")
        print(f"{part}:", flush=True)
        result = (measure_vision if kind == "vision" else measure_generation)(args, int(size), *dtype)
        title, text = (VISION, VISION_TEXT) if kind == "vision" else (GENERATION, GENERATION_TEXT)
        rows = [cells(row, limits) for row in result["rows"]]
        note = f"{'equal' if result['equal'] else '**NOT EQUAL**'}: {'; '.join(result['checks'])}"
        page.put(title, heads(kind), rows, text, {part: note}, names=2)
        page.put_machine([part], describe(versions, limits))
        yield part, result["equal"], {**result, "limits": limits, "versions": versions}


def sides(args):
    return ["ours"] if args.no_peer else ["ours", PEER]


def write_checkpoints(side, directory, small):
    from random_checkpoints import LANGUAGE_CONFIG as SMALL_LANGUAGE_CONFIG
    from random_checkpoints import VISION_CONFIG as SMALL_VISION_CONFIG
    from random_checkpoints import write_model, write_vision_tokenizer

    directory = Path(directory)
    write_vision_tokenizer(
        directory / "vision", SMALL_VISION_CONFIG if small else VISION_CONFIG, min_pixels=32**2, max_pixels=1024**2
    )
    write_model(directory / "language", SMALL_LANGUAGE_CONFIG if small else LANGUAGE_CONFIG)


def measure_vision(args, size):
    """Encode and decode one size. The first call of ours is what the command autoencode.py reports."""
    from PIL import Image

    rng = np.random.default_rng(size)
    picture = rng.integers(0, 256, [size // 8, size // 8, 3], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image = args.directory / "image.png"
    Image.fromarray(picture).save(image)
    pixels = (picture.transpose(2, 0, 1)[None] / np.float32(127.5) - 1).astype(np.float32)
    codes = rng.integers(0, VISUAL_TOKENS, [1, size // 8, size // 8])
    checkpoint = args.directory / "checkpoints/vision"
    given = {"checkpoint": checkpoint, "inputs": args.directory / "inputs.npz"}
    np.savez(given["inputs"], pixels=pixels, codes=codes)
    outputs = {side: args.directory / f"{side}.npz" for side in sides(args)}

    first = [autoencode(args, checkpoint, image)]
    peer = None
    if not args.no_peer:
        peer = call(args, PEER, "measure.vision", **given, outputs=outputs[PEER], warm=args.peer_warm)
    ours = call(args, "ours", "measure.vision", **given, outputs=outputs["ours"], warm=args.warm)
    first.append(autoencode(args, checkpoint, image))
    ours["calls"][:1] = first
    operations = vision_operations(Emu3VisionVQConfig.from_pretrained(checkpoint), size)
    operations["encode + decode"] = sum(operations.values())
    rows = []
    for when in ("first call", "warm"):
        for work, count in operations.items():
            name = {"work": f"{size} x {size} pixels, {work}", "when": when, "operations": count}
            rows.append({**name, **beside(ours, peer, len(first), when, work)})
    checks = []
    if peer:
        from safetensors.numpy import load_file

        codebook = load_file(checkpoint / "model.safetensors")["quantize.embedding.weight"]
        a, b = (dict(np.load(outputs[side])) for side in ("ours", PEER))
        checks.append(compare_codes(a["codes"], b["codes"], b["latents"], codebook))
        checks.append(compare_pixels(a["pixels"], b["pixels"]))
    return result(rows, checks, ours, peer)


def autoencode(args, checkpoint, image):
    print("  ours: autoencode.py ...", end=" ", flush=True)
    stats = args.directory / "stats.json"
    command = [sys.executable, ROOT / "paddlemix/examples/emu3/autoencode.py", f"--model_path={checkpoint}"]
    command += ["--device=cpu", f"--image_path={image}", f"--output_dir={args.directory}", f"--stats_json={stats}"]
    run_command(command)
    found = json.loads(stats.read_text())
    return {**{k: found[k] for k in ("encode_s", "decode_s")}, "peak_bytes": found["peak_memory_mb"] * 2**20}


def measure_generation(args, size, dtype="float32"):
    """One image of size x size tokens, greedy, with guidance; the prompts are fixed ids, so no text is needed.

    `dtype` is of our weights; the peer stays in float32, and only with float32 must its tokens be ours.
    """
    c, rng = Emu3Config, np.random.default_rng(0)
    digits = [ord(d) - 33 for d in f"{size}*{size}"]  # the vocabulary begins with the bytes from "!" on
    prompts = [
        [c.bos_token_id, *rng.integers(256, 100_000, n), c.boi_token_id, *digits, c.img_token_id]
        for n in (PROMPT, NEGATIVE_PROMPT)
    ]
    checkpoint = args.directory / "checkpoints/language"
    given = {"checkpoint": checkpoint, "inputs": args.directory / "inputs.npz"}
    np.savez(
        given["inputs"], positive=prompts[0], negative=prompts[1], size=[size, size], guidance_scale=GUIDANCE_SCALE,
        first_visual=FIRST_VISUAL, codebook_size=VISUAL_TOKENS, eol=c.eol_token_id, eof=c.eof_token_id,
        eoi=c.eoi_token_id, eos=c.eos_token_id, pad=c.pad_token_id,
    )  # fmt: skip
    outputs = {name: args.directory / f"{name}.npz" for name in ("ours", "again", PEER)}
    how = {**given, "warm": args.warm, "dtype": dtype, "decoding": args.decoding}
    ours = call(args, "ours", "measure.generate", **how, outputs=outputs["ours"])
    peer = None
    if not args.no_peer:
        peer = call(args, PEER, "measure.generate", **given, outputs=outputs[PEER], warm=args.peer_warm)
    again = call(args, "ours", "measure.generate", **how, outputs=outputs["again"])
    first = [ours["calls"].pop(0), again["calls"].pop(0)]
    ours["calls"] = [*first, *ours["calls"], *again["calls"]]
    read = image_bytes(Emu3Config.from_pretrained(checkpoint), size, size, dtype)
    name = {"work": f"{size} x {size} tokens, {dtype}", "bytes": read, "tokens": size * (size + 1) + 3}
    rows = [{**name, "when": when, **beside(ours, peer, len(first), when)} for when in ("first call", "warm")]
    codes = {name: np.load(path)["codes"] for name, path in outputs.items() if peer or name != PEER}
    checks = [(bool((codes["ours"] == codes["again"]).all()), "ours gives the same tokens again")]
    if peer and dtype == "float32":
        top = np.load(outputs[PEER])
        checks.append(compare_tokens(codes["ours"], codes[PEER], top["top_codes"], top["top_logits"]))
    passes = f"{first[0]['forward_passes']} forward passes of ours ({args.decoding}) for {size * size} codes"
    return result(rows, [*checks, (True, passes)], ours, peer)


def result(rows, checks, ours, peer):
    checked = {"equal": all(ok for ok, _ in checks), "checks": [text for _, text in checks]}
    return {"rows": rows, **checked, "raw": {"ours": ours, "peer": peer}}


def beside(ours, peer, first, when, work=None):
    """{"ours", "peer"}: the times of both; of ours the first so many calls are first calls."""
    found = {"ours": times(ours["calls"], first, when, work)}
    return {**found, "peer": times(peer["calls"], 1, when, work)} if peer else found


def times(calls, first, when, work=None):
    """{"seconds": the median, "peak_bytes"} of the first calls or of those after; None where there are none."""
    calls = calls[:first] if when == "first call" else calls[first:]
    if not calls:
        return None
    keys = {None: ["seconds"], "encode + decode": ["encode_s", "decode_s"]}.get(work, [f"{work}_s"])
    seconds = statistics.median(sum(call[key] for key in keys) for call in calls)
    return {"seconds": seconds, "peak_bytes": max(call["peak_bytes"] for call in calls)}


# --- the tables ------------------------------------------------------------------------------------------


def heads(kind):
    speeds = [] if kind == "vision" else ["ours, tokens/s", "transformers, tokens/s"]
    peaks = ["ours, peak", "transformers, peak", "of theirs"]
    limits = ["the limit", "ours reaches", "transformers reaches"]
    return ["", "call", "ours", "transformers", "transformers / ours", *speeds, *peaks, *limits]


def cells(row, limits):
    """A line of the table; what was not measured is a dash."""
    ours, peer = row.get("ours"), row.get("peer")
    needed, rate = ("operations", "operations_per_s") if "operations" in row else ("bytes", "read_bytes_per_s")
    least = row[needed] / max(limits[rate].values())

    def each(form):
        return [form(side) if side else "-" for side in (ours, peer)]

    def ratio(key, form):
        return [form(ours[key], peer[key]) if ours and peer else "-"]

    return [
        row["work"], row["when"], *each(lambda side: f"{side['seconds']:.2f} s"),
        *ratio("seconds", lambda a, b: f"**{b / a:.2f}**"),
        *(each(lambda side: f"{row['tokens'] / side['seconds']:.1f}") if "tokens" in row else []),
        *each(lambda side: f"{side['peak_bytes'] / 1e9:.2f} GB"), *ratio("peak_bytes", lambda a, b: f"{a / b:.0%}"),
        f"{least:.2f} s", *each(lambda side: f"{least / side['seconds']:.0%}"),
    ]  # fmt: skip
