# Licensed under the Apache License, Version 2.0; see LICENSE.
"""This project and Hugging Face transformers side by side: the same weights, the same results, seconds and memory.

    make bench                             # all of it; the peer's environment is made first
    make bench BENCH="--quick"             # 128 pixels and 8 x 8 tokens
    make bench BENCH="--parts vision-256"  # one part anew

Every measurement is a process of its own, ours before and after the peer's, with the same cores and threads. The
weights are random, in the released layout, written once (3 GB). Results are gathered in benchmarks/run/results.json,
by part; benchmarks/RESULTS.md is written from it. The exit code is 1 where the two sides differ by more than a
rounding.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))

from report import (
    NEGATIVE_PROMPT,
    PARTS,
    PROMPT,
    drawing_bytes,
    put_section,
    report,
    sections,
    summary,
    vision_operations,
)

from paddlemix.models.emu3.configuration_emu3 import Emu3Config, Emu3VisionVQConfig
from paddlemix.utils import write_atomically

QUICK = ("vision-128", "draw-8")
FIRST_VISUAL = 151854
GUIDANCE_SCALE = 3.0
TIE = 1e-4  # two values nearer than this, relative to their size, may be ordered by rounding


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--quick", action="store_true", help=" ".join(QUICK))
    parser.add_argument("--peer_python", type=Path, default=ROOT / ".venv-peer/bin/python", help="has transformers")
    parser.add_argument("--no_peer", action="store_true", help="measure this project alone")
    parser.add_argument("--peer_warm", type=int, default=1, help="calls of the peer after the first")
    parser.add_argument("--warm", type=int, default=2, help="calls of ours after the first, in each process")
    parser.add_argument("--decoding", default="step", help="how ours draws, where it can choose")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores that both may use")
    parser.add_argument("--directory", type=Path, default=HERE / "run", help="checkpoints and raw results")
    parser.add_argument("--report", type=Path, default=HERE / "RESULTS.md")
    args = parser.parse_args()
    if not args.no_peer and not args.peer_python.exists():
        parser.error(f"{args.peer_python} is missing: make bench makes it, or give --peer_python or --no_peer")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # the processes started here inherit it
    args.directory.mkdir(parents=True, exist_ok=True)
    run(args, "ours", "write", checkpoint="")
    sides = ["ours"] if args.no_peer else ["ours", "peer.theirs"]
    rates = [run(args, side, "limits") for side in sides]
    limits = {key: {k: v for r in rates for k, v in r[key].items()} for key in rates[0] if key.endswith("_per_s")}
    path = args.directory / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    common = {"limits": limits, "versions": {k: v for r in rates for k, v in r["versions"].items()}}
    common["machine"] = machine(args.threads)
    for part in QUICK if args.quick else args.parts:
        kind, size, *dtype = part.split("-")
        result = (measure_vision if kind == "vision" else measure_drawing)(args, int(size), *dtype)
        results[part] = {**result, **common}
        write_atomically(path, json.dumps(results, indent=1) + "\n")
        for title, body in sections(report(results)).items():  # those of other programs stay
            put_section(args.report, title, body)
        print(summary(part, results[part]), flush=True)
    print(f"wrote {args.report}")
    return int(not all(r["equal"] for r in results.values()))


def run(args, side, work, checkpoint=None, inputs=None, outputs=None, warm=0, dtype="float32"):
    """Start measure.py, or for work "autoencode" the command itself, and give back its JSON."""
    python = sys.executable if side == "ours" else args.peer_python.absolute()
    print(f"  {side.split('.')[0]}: {work} ...", end=" ", flush=True)
    if work == "autoencode":
        stats = args.directory / "stats.json"
        command = [ROOT / "paddlemix/examples/emu3/autoencode.py", f"--model_path={checkpoint}", "--device=cpu",
                   f"--image_path={inputs}", f"--output_dir={args.directory}", f"--stats_json={stats}"]  # fmt: skip
    else:
        command = [HERE / "measure.py", side, work, f"--threads={args.threads}", f"--warm={warm}"]
        command += [f"--inputs={inputs}", f"--outputs={outputs}"] if inputs else []
        command += [f"--checkpoint={args.directory / 'checkpoints' / checkpoint}"] if checkpoint is not None else []
        command += [f"--decoding={args.decoding}", f"--dtype={dtype}"] if side == "ours" and work == "draw" else []
    output = start([python, *command], args.threads)
    return json.loads(stats.read_text() if work == "autoencode" else output.splitlines()[-1])


def start(command, threads, **environment):
    """Run a command with so many threads, tell how long it took, and give back what it printed."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment = {**os.environ, **limits, "HF_HUB_OFFLINE": "1", **environment}
    begin = datetime.datetime.now()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}\n{done.stderr[-3000:]}")
    print(f"{(datetime.datetime.now() - begin).total_seconds():.0f} s", flush=True)
    return done.stdout


def measure_vision(args, size):
    """One size there and back. The first call of ours is what the command autoencode.py tells."""
    from PIL import Image

    print(f"vision tokenizer, {size} x {size} pixels", flush=True)
    rng = np.random.default_rng(size)
    picture = rng.integers(0, 256, [size // 8, size // 8, 3], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image, inputs = args.directory / "picture.png", args.directory / "inputs.npz"
    Image.fromarray(picture).save(image)
    pixels = (picture.transpose(2, 0, 1)[None] / np.float32(127.5) - 1).astype(np.float32)
    codes = rng.integers(0, Emu3VisionVQConfig.codebook_size, [1, size // 8, size // 8])
    np.savez(inputs, pixels=pixels, codes=codes)
    checkpoint = args.directory / "checkpoints/vision"
    outputs = {side: args.directory / f"{side}.npz" for side in ("ours", "peer")}

    first = [run(args, "ours", "autoencode", checkpoint, image)]
    peer = None
    if not args.no_peer:
        peer = run(args, "peer.theirs", "vision", "vision", inputs, outputs["peer"], args.peer_warm)
    ours = run(args, "ours", "vision", "vision", inputs, outputs["ours"], args.warm)
    first.append(run(args, "ours", "autoencode", checkpoint, image))
    ours["calls"][:1] = [
        {"encode_s": r["encode_s"], "decode_s": r["decode_s"], "peak_bytes": r["peak_memory_mb"] * 2**20} for r in first
    ]
    operations = vision_operations(Emu3VisionVQConfig.from_pretrained(checkpoint), size)
    operations["encode + decode"] = sum(operations.values())
    rows = []
    for when in ("first call", "warm"):
        for work in operations:
            sides = {"ours": times(ours["calls"], len(first), when, work)}
            if peer:
                sides["peer"] = times(peer["calls"], 1, when, work)
            rows.append({"work": work, "when": when, "operations": operations[work], **sides})
    result = {"rows": rows, "equal": True, "checks": [], "raw": {"ours": ours, "peer": peer}}
    if peer:
        from safetensors.numpy import load_file

        codebook = load_file(checkpoint / "model.safetensors")["quantize.embedding.weight"]
        a, b = (dict(np.load(outputs[side])) for side in ("ours", "peer"))
        checks = [
            compare_codes(a["codes"], b["codes"], b["latents"], codebook),
            compare_pixels(a["pixels"], b["pixels"]),
        ]
        result.update(equal=all(ok for ok, _ in checks), checks=[text for _, text in checks])
    return result


def measure_drawing(args, size, dtype="float32"):
    """One picture of size x size tokens, greedy, with guidance; the prompts are fixed ids, so no text is needed.

    `dtype` is of our weights; the peer stays in float32, and only with float32 must its tokens be ours.
    """
    print(f"drawing, {size} x {size} tokens, {dtype}", flush=True)
    c, rng = Emu3Config, np.random.default_rng(0)
    digits = [ord(d) - 33 for d in f"{size}*{size}"]  # the vocabulary begins with the bytes from "!" on
    prompts = [
        [c.bos_token_id, *rng.integers(256, 100_000, n), c.boi_token_id, *digits, c.img_token_id]
        for n in (PROMPT, NEGATIVE_PROMPT)
    ]
    inputs = args.directory / "inputs.npz"
    np.savez(
        inputs, positive=prompts[0], negative=prompts[1], size=[size, size], guidance_scale=GUIDANCE_SCALE,
        first_visual=FIRST_VISUAL, codebook_size=Emu3VisionVQConfig.codebook_size, eol=c.eol_token_id,
        eof=c.eof_token_id, eoi=c.eoi_token_id, eos=c.eos_token_id, pad=c.pad_token_id,
    )  # fmt: skip
    outputs = {side: args.directory / f"{side}.npz" for side in ("ours", "again", "peer")}
    ours = run(args, "ours", "draw", "language", inputs, outputs["ours"], args.warm, dtype)
    peer = None
    if not args.no_peer:
        peer = run(args, "peer.theirs", "draw", "language", inputs, outputs["peer"], args.peer_warm)
    again = run(args, "ours", "draw", "language", inputs, outputs["again"], args.warm, dtype)
    first = [ours["calls"].pop(0), again["calls"].pop(0)]
    ours["calls"] = [*first, *ours["calls"], *again["calls"]]
    read = drawing_bytes(Emu3Config.from_pretrained(args.directory / "checkpoints/language"), size, size, dtype)
    rows = []
    for when in ("first call", "warm"):
        sides = {"ours": times(ours["calls"], len(first), when)}
        if peer:
            sides["peer"] = times(peer["calls"], 1, when)
        rows.append({"work": "draw", "when": when, "bytes": read, "tokens": size * (size + 1) + 3, **sides})
    codes = {side: np.load(path)["codes"] for side, path in outputs.items() if peer or side != "peer"}
    checks = [(bool((codes["ours"] == codes["again"]).all()), "ours gives the same tokens again")]
    if peer and dtype == "float32":
        top = np.load(outputs["peer"])
        checks.append(compare_tokens(codes["ours"], codes["peer"], top["top_codes"], top["top_logits"]))
    passes = first[0]["forward_passes"]
    texts = [
        *(text for _, text in checks),
        f"{passes} forward passes of ours ({args.decoding}) for {size * size} codes",
    ]
    return {"rows": rows, "equal": all(ok for ok, _ in checks), "checks": texts, "raw": {"ours": ours, "peer": peer}}


def times(calls, first, when, work=None):
    """{"seconds": the median, "peak_bytes"} of the first calls or of those after; None where there are none."""
    calls = calls[:first] if when == "first call" else calls[first:]
    if not calls:
        return None
    keys = {None: ["seconds"], "encode + decode": ["encode_s", "decode_s"]}.get(work, [f"{work}_s"])
    seconds = statistics.median(sum(call[key] for key in keys) for call in calls)
    return {"seconds": seconds, "peak_bytes": max(call["peak_bytes"] for call in calls)}


# --- are they equal? -------------------------------------------------------------------------------------


def compare_codes(ours, peer, latents, codebook):
    """(equal but for ties, what is to be said). A tie: two codewords equally near to the peer's latent."""
    ours, peer = ours.ravel(), peer.ravel()
    places = np.flatnonzero(ours != peer)
    text = f"{len(ours) - len(places)} of {len(ours)} codes equal ({len(np.unique(peer))} distinct)"
    if not len(places):
        return True, text
    z, a, b = (x.astype(np.float64) for x in (latents[places], codebook[ours[places]], codebook[peer[places]]))
    scale = (z**2).sum(1) + (b**2).sum(1)
    gaps = np.abs(((z - a) ** 2).sum(1) - ((z - b) ** 2).sum(1)) / scale
    largest = f"the two codewords' squared distances differ by {gaps.max():.1e} of their size at most"
    return bool(gaps.max() < TIE), f"{text}; elsewhere {largest}"


def compare_pixels(ours, peer):
    error = float(np.abs(ours - peer).max() / np.abs(peer).max())
    return error < 1e-3, f"decoded pixels differ by {error:.1e} of the largest"


def compare_tokens(ours, peer, top_codes, top_logits):
    """(equal up to a tie, what is to be said). After a tie the two go on from different tokens."""
    ours, peer = ours.ravel(), peer.ravel()
    scale = np.abs(top_logits).max()
    clear = f"least gap between the best two guided logits {(top_logits[:, 0] - top_logits[:, 1]).min():.1e}"
    if (ours == peer).all():
        return True, f"all {len(ours)} greedy tokens equal ({len(np.unique(peer))} distinct; {clear})"
    place = int(np.flatnonzero(ours != peer)[0])
    found = np.flatnonzero(top_codes[place] == ours[place])
    gap = float(top_logits[place, 0] - top_logits[place, found[0]]) / scale if len(found) else math.inf
    text = (
        f"first {place} of {len(ours)} greedy tokens equal; there the guided logits of the two sides' tokens differ by "
    )
    text += f"{gap:.1e} of the largest logit"
    return gap < TIE, text


def machine(threads):
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    sets = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": fields.get("model name", platform.machine()), "cores": threads,
        "instructions": " ".join(s for s in sets if s in fields.get("flags", "").split()),
        "memory_gb": round(memory / 1e9), "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(), "commit": commit(), "date": f"{datetime.date.today()}",
    }  # fmt: skip


def commit():
    """The commit that was measured; with a + where tracked files were changed."""
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
