# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The custom operators on a CPU beside Paddle and PyTorch, and beside what the memory gives.

    python benchmarks/operators.py                  # all of it; needs `make ops`, and the peer that `make bench` makes
    python benchmarks/operators.py --parts linear   # one part anew
    python benchmarks/operators.py --small          # a sixteenth of each size, to see that it runs

Every side computes in a process of its own, one after the other, several rounds of them with the read bandwidth in
each; the medians go into benchmarks/RESULTS.md. Few rows and attention take turns over so many copies of their weights
or cache that none is still in the processor's cache when its turn comes. The exit code is 1 where a result of the
operators is not that of Paddle in float64.
"""

import argparse
import functools
import importlib
import itertools
import json
import math
import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from measure import best_rate, timed

TITLE = "The custom operators on a CPU"
FULL = SimpleNamespace(
    hidden=4096, intermediate=14336, many_rows=(512, 2048), cached=(4096, 8200), heads=32, kv_heads=8, dim=128,
    positions=4096, codewords=32768, rotated=1 << 30,
)  # fmt: skip
SMALL = SimpleNamespace(
    hidden=256, intermediate=896, many_rows=(32, 128), cached=(256, 513), heads=4, kv_heads=2, dim=64,
    positions=256, codewords=2048, rotated=0,
)  # fmt: skip
FEW_ROWS = (1, 2, 4, 8, 16)
KINDS = ("float32", "bfloat16", "int8", "int4")
NEW_TOKENS, BATCH = (1, 16), 2
CHECKED = 16  # rows of a product that are compared
LARGEST_ERROR = 1e-5  # of the largest result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls of each kind, in each process")
    parser.add_argument("--small", action="store_true", help="to try the program; RESULTS.md stays as it is")
    parser.add_argument("--peer_python", type=Path, default=HERE.parent / ".venv-peer/bin/python", help="has PyTorch")
    parser.add_argument("--no_peer", action="store_true", help="without PyTorch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores that all may use")
    parser.add_argument("--directory", type=Path, default=HERE / "run", help="raw results")
    parser.add_argument("--report", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return measure_side(args)
    from bench import machine, run
    from report import put_section, sections

    from paddlemix.utils import write_atomically

    if not args.no_peer and not args.peer_python.exists():
        parser.error(f"{args.peer_python} is missing: make bench makes it, or give --peer_python or --no_peer")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    args.directory.mkdir(parents=True, exist_ok=True)
    found = {part: {} for part in args.parts}  # {part: {case: {side: [what each round gave]}}}
    rates, versions = {}, {}
    for _ in range(args.rounds):
        for side in ["ours"] if args.no_peer else ["ours", "peer.theirs"]:
            for name, rate in run(args, side, "limits")["read_bytes_per_s"].items():
                rates[name] = max(rate, rates.get(name, 0))
        for part in args.parts:
            for side in PARTS[part].sides:
                if side != "torch" or not args.no_peer:
                    result = start_side(args, part, side)
                    versions.update(result["versions"] if side in ("ours", "torch") else {})
                    for case, values in result["cases"].items():
                        found[part].setdefault(case, {}).setdefault(side, []).append(values)
    common = {"read_bytes_per_s": rates, "versions": versions, "machine": machine(args.threads), "rounds": args.rounds}
    results = {part: {"cases": {case: medians(sides) for case, sides in cases.items()}, **common}
               for part, cases in found.items()}  # fmt: skip
    if args.small:
        print(section(results))
    else:
        path = args.directory / "operators.json"
        raw = {**(json.loads(path.read_text()) if path.exists() else {}), **results}
        write_atomically(path, json.dumps(raw, indent=1) + "\n")
        page = args.report.read_text() if args.report.exists() else ""
        put_section(args.report, TITLE, section(results, sections(page).get(TITLE, "")))
        print(f"wrote {args.report}")
    return int(any(not equal(case) for part in args.parts for case in results[part]["cases"].values()))


def start_side(args, part, side):
    from bench import start

    print(f"  {side}: {part} ...", end=" ", flush=True)
    python = args.peer_python.absolute() if side == "torch" else sys.executable
    command = [python, __file__, f"--side={side}", f"--parts={part}", f"--threads={args.threads}"]
    command += [f"--seconds={args.seconds}", *(["--small"] if args.small else [])]
    operators = {"EMU3_OPS": "1" if side == "ours" else "0"}
    return json.loads(start(command, args.threads, **operators).splitlines()[-1])


def medians(sides):
    """{side: [{"seconds", ...}]} -> {"seconds": {side: the median}, "share": the median, and what else ours told}"""
    seconds, ours = (
        {side: statistics.median(r["seconds"] for r in rounds) for side, rounds in sides.items()},
        sides["ours"],
    )
    shares = {"share": statistics.median(r["share"] for r in ours)} if "share" in ours[0] else {}
    return {**ours[-1], "seconds": seconds, "error": max(r["error"] for r in ours), **shares}


def equal(case):
    return case["error"] <= LARGEST_ERROR  # NaN is not


# --- in a process of its own -----------------------------------------------------------------------------


def measure_side(args):
    """Print {"cases": {case: {"seconds", "error" of ours, "bytes" or "operations"}}, "versions"}."""
    versions = importlib.import_module("peer.theirs" if args.side == "torch" else "ours").start(args.threads)
    if args.side == "ours" and versions["custom operators"] != "compiled":
        sys.exit("the operators are not built: make ops")
    cases = measure(args.parts[0], args.side, SMALL if args.small else FULL, args.seconds)
    print(json.dumps({"cases": cases, "versions": versions}))


def measure(part, side, sizes, seconds):
    cases, numbers = {}, None
    for case, calls, values in PARTS[part].cases(side, sizes):
        shared = side == "ours" and "bytes" in values
        if shared and numbers is None:
            numbers = np.array_split(
                np.ones(max(sizes.rotated, 1 << 22) // 4, dtype=np.float32), len(os.sched_getaffinity(0))
            )
        before = read_rate(numbers) if shared else None
        values["seconds"] = median_seconds(calls, seconds)
        if shared:
            values["share"] = values["bytes"] / values["seconds"] / max(before, read_rate(numbers))
        if case not in cases or values["seconds"] < cases[case]["seconds"]:  # Paddle's: of two layouts the quicker
            cases[case] = values
    return cases


def read_rate(parts):
    """Bytes a second, of the quicker of two sums, a thread for each part."""
    with ThreadPoolExecutor(len(parts)) as pool:
        return best_rate(sum(part.nbytes for part in parts), lambda: list(pool.map(np.sum, parts)), repeats=2)


def median_seconds(calls, seconds):
    """Of one call, taking turns, until `seconds` have gone by: of slow ones once in each round."""
    calls[-1]()  # makes threads and buffers
    times, turns = [], itertools.cycle(calls)
    while not times or sum(times) < seconds:
        times.append(timed(next(turns))[0])
    return statistics.median(times)


def copies(sizes, tensors):
    """So many copies of some tensors that a turn over all of them passes sizes.rotated bytes."""
    count = max(2, math.ceil(sizes.rotated / size_of(tensors)))
    return [tensors, *([None if t is None else t.clone() for t in tensors] for _ in range(count - 1))]


def size_of(tensors):
    return sum(t.element_size() * math.prod(t.shape) for t in tensors if t is not None)


def error(found, reference):
    """The largest difference, in parts of the largest result."""
    found, reference = (np.asarray(x, dtype=np.float64) for x in (found, reference))
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def linear(side, sizes, row_counts, rotate):
    """Rows times a weight [out, in], of each kind where the side is ours, else float32."""
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (sizes.intermediate, sizes.hidden), "down_proj": (sizes.hidden, sizes.intermediate)}
    for name, (out, columns) in shapes.items():
        numbers = rng.standard_normal([out, columns], dtype=np.float32)
        x = rng.standard_normal([max(row_counts), columns], dtype=np.float32)
        for kind, weight, exact, multiply in weights(side, numbers):
            turns = copies(sizes, weight) if rotate else [weight]
            for rows in row_counts:
                given = tensor_of(side, x[:rows])
                values = {"bytes": size_of(weight)} if rotate else {"operations": 2 * rows * out * columns}
                if exact is not None:
                    places = np.linspace(0, rows - 1, min(rows, CHECKED)).astype(int)
                    reference = tensor_of(side, x[places].astype(np.float64)).matmul(exact, transpose_y=True)
                    values["error"] = error(multiply(given, *weight).numpy()[places], reference)
                calls = [functools.partial(multiply, given, *each) for each in turns]
                yield f"{name} [{out}, {columns}] | {kind} | {rows}", calls, values


def weights(side, numbers):
    """(kind, its tensors, the same numbers in float64 for ours, how x is multiplied by them)"""
    weight = tensor_of(side, numbers)
    if side == "torch":
        import torch

        yield "float32", [weight], None, torch.nn.functional.linear
    elif side == "paddle":
        import paddle

        yield "float32", [weight], None, functools.partial(paddle.matmul, transpose_y=True)
        yield "float32", [weight.t().contiguous()], None, paddle.matmul
    else:
        from paddlemix.external_ops.few_rows_linear import dequantize, few_rows_linear, quantize

        for kind in KINDS:
            if kind.startswith("int"):
                tensors = list(quantize(weight, int(kind[3:])))
                exact = dequantize(*tensors, numbers.shape[1])
            else:
                tensors = [weight.astype(kind), None]
                exact = tensors[0]
            yield kind, tensors, exact.astype("float64"), few_rows_linear


def tensor_of(side, array):
    module = importlib.import_module("torch" if side == "torch" else "paddle")
    return module.from_numpy(array) if side == "torch" else module.to_tensor(array)


def attention(side, sizes):
    """New tokens of two rows over the cache, whose last tokens they are."""
    import paddle

    from paddlemix.external_ops.cached_attention import cached_attention
    from paddlemix.models.emu3.cache import CACHE_BLOCK

    rng = np.random.default_rng(0)
    for kind, cached in itertools.product(("float32", "bfloat16"), sizes.cached):
        room = math.ceil((cached + max(NEW_TOKENS)) / CACHE_BLOCK) * CACHE_BLOCK
        shape = [BATCH, sizes.kv_heads, room, sizes.dim]
        cache = [paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32)).astype(kind) for _ in "kv"]
        if side == "paddle":  # in the layout that its function takes
            cache = [x.transpose([0, 2, 1, 3]).contiguous() for x in cache]
        turns = copies(sizes, cache)
        for new in NEW_TOKENS:
            query = paddle.to_tensor(rng.standard_normal([BATCH, new, sizes.heads, sizes.dim], dtype=np.float32))
            values = {"bytes": size_of(cache) * (cached + new) // room}
            if side == "ours":
                found = cached_attention(query, *cache, cached + new)
                values["error"] = error(found, attention_in_float64(query, *cache, cached + new))
            attend = paddle_attention if side == "paddle" else cached_attention
            calls = [functools.partial(attend, query, *each, cached + new) for each in turns]
            yield f"{kind} | {cached} | {new}", calls, values


def paddle_attention(query, key, value, length):
    """By Paddle's own function, which takes as many heads of keys as of queries, all of one dtype, and any mask."""
    import paddle
    import paddle.nn.functional as F

    new, heads = query.shape[1:3]
    key, value = (x[:, :length].astype("float32").repeat_interleave(heads // x.shape[2], axis=2) for x in (key, value))
    mask = paddle.arange(length) <= paddle.arange(length - new, length).unsqueeze(-1) if new > 1 else None
    return F.scaled_dot_product_attention(query, key, value, mask)


def attention_in_float64(query, key, value, length):
    query, key, value = (x.astype("float32").numpy().astype(np.float64) for x in (query, key, value))
    batch, new, heads, dim = query.shape
    out = np.empty(query.shape)
    for b, head in np.ndindex(batch, heads):
        k, v = (x[b, head // (heads // x.shape[1]), :length] for x in (key, value))
        scores = query[b, :, head] @ k.T / math.sqrt(dim)
        scores[np.arange(length) > np.arange(length - new, length)[:, None]] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, :, head] = scores @ v / scores.sum(-1, keepdims=True)
    return out.reshape([batch, new, heads * dim])


def others(side, sizes):
    """An RMS norm and the nearest codeword."""
    import paddle

    from paddlemix.external_ops.fused_ln import fused_rms_norm
    from paddlemix.external_ops.nearest_codeword import nearest_codeword
    from paddlemix.models.emu3 import Emu3VisionVQConfig

    rng = np.random.default_rng(0)
    dim, epsilon = Emu3VisionVQConfig.embed_dim, 1e-5
    shapes = [BATCH, sizes.hidden], [sizes.hidden], [sizes.positions, dim], [sizes.codewords, dim]
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    x, scale, latents, codebook = map(paddle.to_tensor, arrays)
    norm = functools.partial(fused_rms_norm, x, scale, epsilon)
    search = functools.partial(nearest_codeword, latents, codebook)
    errors = [{}, {}]
    if side == "ours":
        x, scale, latents, codebook = (a.astype(np.float64) for a in arrays)
        reference = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale
        errors = [{"error": error(norm()[0], reference)}, {"error": excess(search().numpy(), latents, codebook)}]
    yield f"fused_rms_norm {shapes[0]}", [norm], errors[0]
    yield f"nearest_codeword, {sizes.positions} positions, {sizes.codewords} codewords", [search], errors[1]


def excess(codes, latents, codebook, chunk=256):
    """By how much a chosen codeword's squared distance exceeds the least one, at most, in parts of the largest."""
    worst = largest = 0.0
    for start in range(0, len(codes), chunk):
        z, chosen = latents[start : start + chunk], codes[start : start + chunk]
        distances = (z * z).sum(1)[:, None] + (codebook * codebook).sum(1) - 2 * z @ codebook.T
        worst = max(worst, (distances[np.arange(len(z)), chosen] - distances.min(1)).max())
        largest = max(largest, distances.max())
    return float(worst / largest)


SIDES = {
    "ours": "ours",
    "fallback": "without the operators",
    "paddle": "Paddle",
    "torch": "PyTorch",
}
PARTS = {
    "linear": SimpleNamespace(
        title="Few rows", sides=("ours", "paddle", "torch"), heads=("layer [out, in]", "weights", "rows"),
        cases=functools.partial(linear, row_counts=FEW_ROWS, rotate=True),
        text="`few_rows_linear` of float32 activations. Paddle's `matmul` ([out, in] or [in, out], the quicker one)\n"
        "and PyTorch's `linear` have float32 weights.",
    ),
    "blocked": SimpleNamespace(
        title="Many rows", sides=("ours", "paddle"), heads=("layer [out, in]", "weights", "rows"),
        cases=lambda side, sizes: linear(side, sizes, sizes.many_rows, rotate=False),
        text="The blocked path of `few_rows_linear`; Paddle's `matmul` of float32 weights, the quicker layout.",
    ),
    "attention": SimpleNamespace(
        title="Attention over the cache", sides=("ours", "fallback", "paddle"), heads=("cache", "cached", "new"),
        cases=attention,
        text="`cached_attention` of two rows. Paddle's `scaled_dot_product_attention` has float32 keys and values,\n"
        "repeated for all heads.",
    ),
    "others": SimpleNamespace(
        title="Norm and codebook", sides=("ours", "fallback"), heads=("operator",), cases=others, text="",
    ),
}  # fmt: skip


# --- the section -----------------------------------------------------------------------------------------


def section(results, earlier=""):
    """What was measured; parts that were not stay as the earlier section has them."""
    text = """\
`benchmarks/operators.py`: medians of calls in processes of their own, in turns; few rows and attention go over copies
of at least 1 GiB, so that no weight or cache is found in the processor's cache. The read bandwidth is that of summing
1 GiB in the same process just before or after, the quicker of them: it differs from minute to minute. Difference: the
largest from Paddle's or NumPy's float64 of the same numbers, in parts of the largest result.
"""
    verdicts = ""
    for part in PARTS:
        title = PARTS[part].title
        if part in results:
            text += f"\n### {title}\n\n{table(part, results[part])}"
            text += f"\n{PARTS[part].text}\n" if PARTS[part].text else ""
            verdicts += f"- {verdict(part, results[part])}\n"
        elif block := re.search(rf"\n### {title}\n\n.*?\n(?=\n### |\n- )", earlier, re.DOTALL):
            text += block[0]
            verdicts += re.search(rf"^- {title}: .*$", earlier, re.MULTILINE)[0] + "\n"
    return f"{text}\n{verdicts}"


def table(part, result):
    sides = [side for side in PARTS[part].sides if any(side in c["seconds"] for c in result["cases"].values())]
    first = next(iter(result["cases"].values()))
    measures = ["GB/s", "of the read bandwidth"] if "bytes" in first else []
    beside = [cell for side in sides[1:] for cell in (SIDES[side], "times faster")]
    heads = [*PARTS[part].heads, "ours", *measures, *beside, "difference"]
    lines = [heads, ["---"] * len(heads)]
    for name, case in result["cases"].items():
        cells = [*name.split(" | "), duration(case, "ours")]
        if measures:
            speed = case["bytes"] / case["seconds"]["ours"]
            cells += [f"{speed / 1e9:.1f}", f"{case['share']:.0%}"]
        for side in sides[1:]:
            other = base(name, side, result["cases"])
            cells += [duration(other, side), f"**{other['seconds'][side] / case['seconds']['ours']:.2f}**"]
        lines.append([*cells, f"{case['error']:.0e}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def base(name, side, cases):
    """The case of another side that a case of ours is compared with: its own, or that of float32 weights."""
    if side in cases[name]["seconds"]:
        return cases[name]
    layer, _, rows = name.split(" | ")
    return cases[f"{layer} | float32 | {rows}"]


def duration(case, side):
    seconds = case["seconds"][side]
    text = f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{2 if seconds >= 1e-3 else 4}f} ms"
    return f"{text}, {case['operations'] / seconds / 1e9:.0f} GFLOP/s" if "operations" in case else text


def verdict(part, result):
    wrong = [name.replace(" | ", ", ") for name, case in result["cases"].items() if not equal(case)]
    found = f"**NOT EQUAL**: {'; '.join(wrong)}" if wrong else "equal"
    m = result["machine"]
    rates = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in result["read_bytes_per_s"].items())
    versions = ", ".join(f"{k} {v}" for k, v in {"Python": m["python"], **result["versions"]}.items())
    return (
        f"{PARTS[part].title}: {found}; rounds: {result['rounds']}; commit {m['commit']}, {m['date']}; {m['cpu']}, "
        f"{m['cores']} cores, {m['instructions']}, {m['memory_gb']} GB, {m['system']}; {versions}. Reading: {rates}."
    )


if __name__ == "__main__":
    sys.exit(main())
