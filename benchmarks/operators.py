# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The custom operators on a CPU beside Paddle and PyTorch, and beside the read bandwidth. Needs `make ops`.

Every side computes in a process of its own, one after the other, several rounds of them with the read bandwidth in
each; the medians are reported. Few rows and attention take turns over so many copies of their weights or cache that
none is still in the processor's cache when its turn comes. Fails where a result of the operators is not that of Paddle
in float64.
"""

import functools
import importlib
import itertools
import math
import statistics
import sys
from types import SimpleNamespace

import numpy as np
from machine import describe
from measure import PEER, call, threads, timed
from ours import read_rate

HAS_PEER = True
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
CACHE_BLOCK = 1024  # the capacity of a cache is a multiple of it
CHECKED = 16  # rows of a product that are compared
LARGEST_ERROR = 1e-5  # of the largest result
ROUNDED = {"bfloat16": 5e-3, "int8": 1e-4, "int4": 2e-2}  # where activations are rounded beside weights of these


def add_arguments(parser):
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls of each kind, in each process")


def run(args, page):
    found = {part: {} for part in args.parts}  # {part: {case: {side: [the result of each round]}}}
    rates, versions = {}, {}
    for _ in range(args.rounds):
        for side in ["ours"] if args.no_peer else ["ours", PEER]:
            for name, rate in call(args, side, "measure.limits")["read_bytes_per_s"].items():
                rates[name] = max(rate, rates.get(name, 0))
        for part in args.parts:
            for side in PARTS[part].sides:
                if side != "torch" or not args.no_peer:
                    result = measure_side(args, part, side)
                    versions.update(result["versions"] if side in ("ours", "torch") else {})
                    for case, values in result["cases"].items():
                        found[part].setdefault(case, {}).setdefault(side, []).append(values)
    for part in args.parts:
        cases = {case: medians(sides) for case, sides in found[part].items()}
        put(page, part, cases, args.rounds)
        page.put_machine([PARTS[part].title.lower()], describe(versions, {"read_bytes_per_s": rates}))
        yield part, all(map(equal, cases.values())), {"cases": cases, "read_bytes_per_s": rates, "versions": versions}


def measure_side(args, part, side):
    module, switch = PEER if side == "torch" else "ours", {"EMU3_OPS": "1" if side == "ours" else "0"}
    given = {"part": part, "of": side, "small": args.small, "seconds": args.seconds}
    return call(args, module, "operators.measure_part", switch, **given)


def medians(sides):
    """{side: [{"seconds", ...}]} -> {"seconds": {side: the median}, "share": the median, and what else ours gave}"""
    ours = sides["ours"]
    seconds = {side: statistics.median(r["seconds"] for r in rounds) for side, rounds in sides.items()}
    shares = {"share": statistics.median(r["share"] for r in ours)} if "share" in ours[0] else {}
    return {**ours[-1], "seconds": seconds, "error": max(r["error"] for r in ours), **shares}


def equal(case):
    return case["error"] <= case.get("bound", LARGEST_ERROR)  # NaN is not


# --- in a process of its own -----------------------------------------------------------------------------


def measure_part(module, part, of, small, seconds):
    """{"cases": {case: {"seconds", "error" of ours, "bytes" or "operations"}}}"""
    if of == "ours":
        from paddlemix.external_ops import operators

        if not operators():
            sys.exit("the operators are not built: make ops")
    return {"cases": measure(part, of, SMALL if small else FULL, seconds)}


def measure(part, side, sizes, seconds):
    cases, numbers = {}, None
    for case, calls, values in PARTS[part].cases(side, sizes):
        shared = side == "ours" and "bytes" in values
        if shared and numbers is None:
            numbers = np.array_split(np.ones(max(sizes.rotated, 1 << 22) // 4, dtype=np.float32), threads())
        before = read_rate(numbers, repeats=2) if shared else None
        values["seconds"] = median_seconds(calls, seconds)
        if shared:
            values["share"] = values["bytes"] / values["seconds"] / max(before, read_rate(numbers, repeats=2))
        if case not in cases or values["seconds"] < cases[case]["seconds"]:  # Paddle's: of two layouts the quicker
            cases[case] = values
    return cases


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
                    values["bound"] = ROUNDED.get(kind, LARGEST_ERROR)
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

    rng = np.random.default_rng(0)
    for kind, cached in itertools.product(("float32", "bfloat16"), sizes.cached):
        capacity = math.ceil((cached + max(NEW_TOKENS)) / CACHE_BLOCK) * CACHE_BLOCK
        shape = [BATCH, sizes.kv_heads, capacity, sizes.dim]
        cache = [paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32)).astype(kind) for _ in "kv"]
        if side == "paddle":  # in the layout that its function takes
            cache = [x.transpose([0, 2, 1, 3]).contiguous() for x in cache]
        turns = copies(sizes, cache)
        for new in NEW_TOKENS:
            query = paddle.to_tensor(rng.standard_normal([BATCH, new, sizes.heads, sizes.dim], dtype=np.float32))
            values = {"bytes": size_of(cache) * (cached + new) // capacity}
            attend, length = (paddle_attention if side == "paddle" else cached_attention), cached + new
            if side != "paddle":
                length = paddle.full([BATCH], cached + new, "int64")
            if side == "ours":
                found = cached_attention(query, *cache, length)
                values["error"] = error(found, attention_in_float64(query, *cache, cached + new))
            calls = [functools.partial(attend, query, *each, length) for each in turns]
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


SIDES = {"ours": "ours", "fallback": "without the operators", "paddle": "Paddle", "torch": "PyTorch"}
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


# --- the tables ------------------------------------------------------------------------------------------

TEXT = """
Medians of calls in processes of their own, in turns; few rows and attention go over copies of at least 1 GiB, so that
no weight or cache is found in the processor's cache. The read bandwidth is that of summing 1 GiB in the same process
just before or after, the quicker of them: it differs from minute to minute. Difference: the largest from Paddle's or
NumPy's float64 of the same numbers, in parts of the largest result.
"""
LIKE_FEW_ROWS = "\nMeasured like few rows.\n"


def title(part):
    return f"Custom operators: {PARTS[part].title.lower()}"


def put(page, part, cases, rounds):
    wrong = [name.replace(" | ", ", ") for name, case in cases.items() if not equal(case)]
    verdict = f"**NOT EQUAL**: {'; '.join(wrong)}" if wrong else "equal"
    heads, *rows = lines(part, cases)
    names = len(PARTS[part].heads)
    notes = {PARTS[part].title.lower(): f"{verdict}; rounds: {rounds}"}
    text = f"{PARTS[part].text}{TEXT if part == 'linear' else LIKE_FEW_ROWS}"
    page.put(title(part), heads, rows, text, notes, names)


def lines(part, cases):
    """The columns' titles, and a row of cells for each case."""
    sides = [side for side in PARTS[part].sides if any(side in c["seconds"] for c in cases.values())]
    measures = ["GB/s", "of the read bandwidth"] if "bytes" in next(iter(cases.values())) else []
    beside = [cell for side in sides[1:] for cell in (SIDES[side], f"{SIDES[side]} / ours")]
    found = [[*PARTS[part].heads, "ours", *measures, *beside, "difference"]]
    for name, case in cases.items():
        cells = [*name.split(" | "), duration(case, "ours")]
        if measures:
            speed = case["bytes"] / case["seconds"]["ours"]
            cells += [f"{speed / 1e9:.1f}", f"{case['share']:.0%}"]
        for side in sides[1:]:
            other = base(name, side, cases)
            cells += [duration(other, side), f"**{other['seconds'][side] / case['seconds']['ours']:.2f}**"]
        found.append([*cells, f"{case['error']:.0e}"])
    return found


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
