# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tuning, a side in a process of its own: seconds of a step, losses and peak memory.

    benchmarks/measure.py ours training.write '{"directory": "D"}'
    .venv-peer/bin/python benchmarks/measure.py peer.theirs training.train \
        '{"checkpoint": "D/middle", "rows": "D/middle-1x1024.npz", "steps": 4, "recompute": true}'
"""

from pathlib import Path

import numpy as np
from measure import ROOT, timed

from paddlemix.machine import peak_host_memory

MINI = ROOT / "paddlemix" / "demo_models" / "emu3_mini" / "language_model"
SIZES = {"mini": [(4, 512), (2, 1024)], "middle": [(1, 1024), (1, 4096)]}  # checkpoint: rows and tokens of a step
PROMPT, WIDTH = 40, 32  # tokens before the picture's, codes of a row of it
IGNORED = -100


def write(side, directory):
    """The checkpoint "middle" of random weights, and for each size the rows of its steps: NAME-ROWSxTOKENS.npz."""
    from compare import LANGUAGE_CONFIG
    from random_checkpoints import write_model

    from paddlemix.models.emu3 import Emu3Config

    directory = Path(directory)
    write_model(directory / "middle", LANGUAGE_CONFIG)
    for name, sizes in SIZES.items():
        config = Emu3Config.from_pretrained(MINI if name == "mini" else directory / name)
        for count, length in sizes:
            np.savez(directory / f"{name}-{count}x{length}.npz", **rows(config, count, length))


def rows(config, count, length):
    """ids and labels, int64 [count, length], as a drawing has them: loss on the visual tokens, none on row ends."""
    rng = np.random.default_rng(length)
    first = config.eoi_token_id + 1
    ids = rng.integers(first, config.vocab_size, [count, length])
    ids[:, :PROMPT] = rng.integers(0, 700, [count, PROMPT])
    ids[:, PROMPT + WIDTH :: WIDTH + 1] = config.eol_token_id
    return {"ids": ids, "labels": np.where(ids >= first, ids, IGNORED)}


def train(side, checkpoint, rows, steps, recompute):
    """Steps of AdamW on the same rows: {load_s, tokens, steps: [{seconds, loss, peak_bytes}]}; the first step warms up.

    recompute: a layer's values are computed again for its gradient, to save memory.
    """
    given = np.load(rows)
    load_s, step = timed(side.load_training, Path(checkpoint), recompute)
    done = []
    for _ in range(steps):
        seconds, loss = timed(step, given["ids"], given["labels"])
        done.append({"seconds": seconds, "loss": loss, "peak_bytes": peak_host_memory()})
    return {"load_s": load_s, "tokens": given["ids"].size, "steps": done}
