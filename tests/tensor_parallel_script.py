# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What each of the two processes of tests/test_tensor_parallel.py does: FOLDER GOLDEN_MODEL PICTURE."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

DRAW = ("--model_path=emu3-mini", "--dtype=float32", "--prompt", "a small red ring", "--seed=3",
        "--height=32", "--width=32")  # fmt: skip
ASK = ("--model_path=emu3-mini", "--dtype=float32", "--question", "Please describe the image", "--image_path")


def models(golden):
    """{name of the results: (checkpoint, dtype)}"""
    mini = {dtype: ("emu3-mini", dtype) for dtype in ("float32", "bfloat16", "int8", "int4")}
    return {**mini, "golden": (golden, "float32")}


def load(name, dtype, ranks=None):
    """A model that keeps keys and values in float32: of 16 bits one that is rounded the other way, once in many
    thousands, is enough for another token."""
    from paddlemix.models.emu3 import Emu3ForCausalLM
    from paddlemix.models.emu3.cache import KVCache

    model = Emu3ForCausalLM.from_pretrained(name, dtype=dtype, ranks=ranks)
    model.make_cache = lambda slots, length: KVCache(model.config, slots, length, "float32", ranks)
    return model


def logits_of(model):
    import paddle

    with paddle.no_grad():
        return model(paddle.arange(1, 25).unsqueeze(0), use_cache=False).logits.numpy()


def tokens_of(model, batch):
    """The tokens of two drawings, and of two answers that join when these have begun."""
    from paddlemix.models.emu3.image_grammar import ImageGrammar
    from paddlemix.models.emu3.sampling import GREEDY, Sampling
    from paddlemix.models.emu3.sequences import Answer, Drawing

    grammar, text = ImageGrammar.from_config(model.config), list(range(10, 30))
    head = [grammar.boi, 5, 6, grammar.img]
    drawings = [
        Drawing([*text, *head], (3, 4), grammar, head, sampling=Sampling(seed=7)),
        Drawing([*text[:5], *head], (2, 3), grammar, guidance_scale=1, sampling=GREEDY, number=1),
    ]
    answers = [Answer([*text, 100, 101], 4, model.config), Answer(text[:4], 3, model.config, Sampling(seed=1))]
    batch.join(*drawings)
    for _ in range(3):
        batch.step()
    batch.join(*answers)
    while batch:
        batch.step()
    return [drawing.drawn().tolist() for drawing in drawings] + [answer.ids for answer in answers]


def main(folder, golden, picture):
    from paddlemix.commands import generate, understand
    from paddlemix.commands.console import run
    from paddlemix.machine import start_paddle

    start_paddle("cpu")
    from paddlemix.models.emu3.parallel import TensorParallel
    from paddlemix.models.emu3.shared_batch import SharedBatch, end, follow

    ranks = TensorParallel()
    for result, (name, dtype) in models(golden).items():
        model = load(name, dtype, ranks)
        logits = logits_of(model)
        if ranks.rank:
            follow(ranks, {None: SimpleNamespace(model=model)})
            continue
        tokens = tokens_of(model, SharedBatch(model))
        np.save(Path(folder, f"{result}.npy"), logits)
        Path(folder, f"{result}.json").write_text(json.dumps({"tokens": tokens, "used": end(model)}))
    shared = ("--tensor_parallel", "--device=cpu", "--stats_json")
    run(generate.parser(), generate.main, [*DRAW, *shared, f"{folder}/draw.stats", "--output_dir", folder])
    run(understand.parser(), understand.main, [*ASK, picture, *shared, f"{folder}/ask.stats"])


if __name__ == "__main__":
    main(*sys.argv[1:])
