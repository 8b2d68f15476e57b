# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tuning beside transformers: tokens a second and peak memory of a step of AdamW on the same rows, in float32.

Attention dropout is the released config's, 0.1, and 0, with which the losses of both sides are compared: it fails where
they differ. The best step after the first counts. Then the peak memory of every way to train, beside the formula by
which `emu3 train` refuses what does not fit.
"""

import os
from pathlib import Path

import numpy as np
from machine import describe
from measure import PEER, ROOT, call, timed

from paddlemix.machine import peak_host_memory

HAS_PEER = True
MINI = ROOT / "paddlemix" / "demo_models" / "emu3_mini" / "language_model"
SIZES = {"mini": [(4, 512), (2, 1024)], "middle": [(1, 1024), (1, 4096)]}  # checkpoint: rows and tokens of a step
WAYS = [f"{dtype}{lora}{recompute}" for dtype, loras in (("float32", ("", "-lora")), ("bfloat16", ("", "-lora")),
        ("int8", ("-lora",)), ("int4", ("-lora",))) for lora in loras for recompute in ("", "-recompute")]  # fmt: skip
PROMPT, WIDTH = 40, 32  # tokens before the picture's, codes of a row of it
IGNORED = -100
TOLERANCE = 1e-4  # of losses

TITLE = "Fine-tuning: a step of AdamW, float32"
HEADS = ["", "attention dropout", "ours, tokens/s", "transformers, tokens/s", "ours / transformers", "ours, peak",
         "transformers, peak", "transformers / ours, peak"]  # fmt: skip
TEXT = """\
Both sides train the same weights (middle: random, hidden 1024 x 8 layers over the real vocabulary; mini: emu3-mini) on
the same rows, forward, backward, clipping and AdamW; the best of {} steps after the first. transformers with scaled dot
product attention and the fused AdamW of PyTorch. Recompute: a layer's activations are computed again in the backward
pass. 0.1 is the attention dropout of the released config. The processor ran {:.1f} other programs a core while it was
measured.
"""

MEMORY = "Fine-tuning: memory of the ways to train"
MEMORY_HEADS = ["", "tokens", "weights", "gradients, moments, masters", "activations", "head", "formula", "measured",
                "measured / formula"]  # fmt: skip
MEMORY_TEXT = """\
GB, on a CPU. Hidden 1024 x 8 layers over the real vocabulary, one row; LoRA of rank 8 beside all projections. The
formula is `training_bytes` in `paddlemix/models/emu3/needs.py`, by part; measured is the operating system's peak of a
process that makes two steps, less its peak before the model is loaded.
"""


def add_arguments(parser):
    names = [f"{name}-{count}x{length}" for name, sizes in SIZES.items() for count, length in sizes]
    parser.add_argument("--sizes", nargs="*", default=names, help="checkpoint-ROWSxTOKENS of those that are measured")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.1, 0.0])
    parser.add_argument("--recompute", type=int, nargs="+", default=[0, 1], choices=[0, 1], help="without, with")
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS, metavar="WAY", help=" ".join(WAYS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="of the ways")
    parser.add_argument("--steps", type=int, default=3, help="after the first")


def run(args, page):
    directory = args.directory / "training"
    sizes = ["mini-1x64"] if args.small else args.sizes
    call(args, "ours", "training.write", directory=directory, sizes=sizes if args.small else [*sizes, "middle-1x64"])
    sides = ["ours"] if args.no_peer else ["ours", PEER]
    for size in sizes:
        rows, equal, results = [], True, {}
        checkpoint = MINI if size.startswith("mini") else directory / size.partition("-")[0]
        for recompute in args.recompute:
            for dropout in args.dropout:
                given = {"checkpoint": checkpoint, "rows": directory / f"{size}.npz", "steps": 1 + args.steps}
                given |= {"recompute": bool(recompute), "dropout": dropout}
                r = {side: call(args, side, "training.train", **given) for side in sides}
                name = f"{size}, recompute" if recompute else size
                rows.append(row_of(name, dropout, r["ours"], r.get(PEER)))
                if dropout == 0 and PEER in r:
                    equal &= same_losses(r["ours"], r[PEER])
                results[f"{name}, {dropout}"] = r
        crowd = max(0.0, os.getloadavg()[0] / args.threads - 1)
        verdict = {} if args.no_peer else {size: "equal" if equal else "**NOT EQUAL**"}
        page.put(TITLE, HEADS, rows, TEXT.format(args.steps, crowd), verdict, names=2)
        versions = {key: value for side in r.values() for key, value in side["versions"].items()}
        page.put_machine([f"training {size}"], describe(versions))
        yield size, equal, results
    for tokens in [64] if args.small else args.tokens:
        for way in args.ways:
            given = {"checkpoint": MINI if args.small else directory / "middle", "tokens": tokens, "way": way}
            r = call(args, "ours", "training.memory", **given)
            page.put(MEMORY, MEMORY_HEADS, [memory_row(way, tokens, r)], MEMORY_TEXT, names=2)
            page.put_machine([f"training memory {way} {tokens}"], describe(r["versions"]))
            yield f"memory {way} {tokens}", True, r


def memory_row(way, tokens, result):
    parts = result["formula"]
    formula, measured = sum(parts.values()), result["peak_bytes"] - result["base_bytes"]
    sizes = [f"{size / 1e9:.2f}" for size in (*parts.values(), formula, measured)]
    return [way.replace("-", ", "), f"{tokens:,}", *sizes, f"{measured / formula:.2f}"]


def row_of(name, dropout, ours, theirs):
    """A row of the table; theirs may be None."""
    cells = [name, f"{dropout:g}"]
    rates = [side and side["tokens"] / min(step["seconds"] for step in side["steps"][1:]) for side in (ours, theirs)]
    peaks = [side and side["steps"][-1]["peak_bytes"] for side in (ours, theirs)]
    for (a, b), unit, ratio in ((rates, "{:.0f}", lambda a, b: a / b), (peaks, "{:.2f} GB", lambda a, b: b / a)):
        a, b = (x and (x if unit == "{:.0f}" else x / 1e9) for x in (a, b))
        cells += [unit.format(a), *((unit.format(b), f"**{ratio(a, b):.2f}**") if b else ("-", "-"))]
    return cells


def same_losses(ours, theirs):
    pairs = zip(ours["steps"], theirs["steps"], strict=True)
    return all(abs(a["loss"] - b["loss"]) <= TOLERANCE * abs(b["loss"]) for a, b in pairs)


def write(side, directory, sizes):
    """Checkpoints of random weights, and the rows of the steps of each size: NAME-ROWSxTOKENS.npz."""
    from compare import LANGUAGE_CONFIG
    from random_checkpoints import write_language_model

    from paddlemix.models.emu3 import Emu3Config

    directory = Path(directory)
    for size in sizes:
        name, _, shape = size.partition("-")
        if name != "mini":
            write_language_model(directory / name, LANGUAGE_CONFIG)
        config = Emu3Config.from_pretrained(MINI if name == "mini" else directory / name)
        directory.mkdir(parents=True, exist_ok=True)
        np.savez(directory / f"{size}.npz", **rows(config, *map(int, shape.split("x"))))


def rows(config, count, length):
    """ids and labels, int64 [count, length], as a drawing has them: loss on the visual tokens, none on row ends."""
    rng = np.random.default_rng(length)
    first = config.eoi_token_id + 1
    ids = rng.integers(first, config.vocab_size, [count, length])
    ids[:, :PROMPT] = rng.integers(0, 700, [count, PROMPT])
    ids[:, PROMPT + WIDTH :: WIDTH + 1] = config.eol_token_id
    return {"ids": ids, "labels": np.where(ids >= first, ids, IGNORED)}


def train(side, checkpoint, rows, steps, recompute, dropout):
    """Steps of AdamW on the same rows: {load_s, tokens, steps: [{seconds, loss, peak_bytes}]}; the first step warms up.

    recompute: a layer's values are computed again for its gradient, to save memory. dropout: of attention.
    """
    given = np.load(rows)
    load_s, step = timed(side.load_training, Path(checkpoint), recompute, dropout)
    done = []
    for _ in range(steps):
        seconds, loss = timed(step, given["ids"], given["labels"])
        done.append({"seconds": seconds, "loss": loss, "peak_bytes": peak_host_memory()})
    return {"load_s": load_s, "tokens": given["ids"].size, "steps": done}


def memory(side, checkpoint, tokens, way):
    """Two steps in one way to train: {formula: {part: bytes}, base_bytes, peak_bytes}"""
    from paddlemix.machine import return_freed_memory
    from paddlemix.models.emu3 import Emu3Config
    from paddlemix.models.emu3.needs import training_bytes
    from paddlemix.models.emu3.parallel import Ranks
    from paddlemix.training.settings import Settings
    from paddlemix.training.train import load_model

    dtype, lora, recompute = way.partition("-")[0], "-lora" in way, way.endswith("recompute")
    settings = Settings(checkpoint, "none", "none", dtype=dtype, lora=lora, recompute=recompute)
    config, ranks = Emu3Config.from_pretrained(checkpoint), Ranks()
    return_freed_memory()  # as `emu3 train` does
    base = peak_host_memory()
    model, weights, _ = load_model(settings, config, None, tokens, ranks, None)
    step = side.training_step(model.train(), weights)
    given = rows(config, 1, tokens)
    for _ in range(2):
        step(given["ids"], given["labels"])
    formula = training_bytes(config, dtype, tokens, settings.lora_rank if lora else 0, recompute)
    return {"formula": formula, "base_bytes": base, "peak_bytes": peak_host_memory()}
