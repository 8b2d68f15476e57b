# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Replace the codes of prepared drawings by those that Emu3-Mini takes in places of the same kind.

Its vision tokenizer encodes what looks alike by one of several codes that decode alike. Emu3-Mini was taught to draw
with one of them for each kind of place, and the others are so unlikely to it that a fine-tuning on codes as they are
would first have to undo that. So of the codes that the encoder gives in a kind of place, take the one that the model
finds likeliest. The released models were trained on codes as they are, and need none of this.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "mini")]

import numpy as np
from tqdm import tqdm
from world import COLOURS, NEW_COLOURS, NEW_SHAPES, SHAPES, SIZES, TONES, Scene, Thing, caption, places, render

BATCH = 32
PASSES = 2  # of the model over all scenes, each over the codes that the one before has chosen
CENTRES = (16, 32, 48)


def scenes_of_all_things(times, rng):
    """Pairs of objects on one tone: each shape, colour and size so many times."""
    kinds = [(s, c, z) for s in SHAPES + NEW_SHAPES for c in (*COLOURS, *NEW_COLOURS) for z in SIZES]
    for tone in TONES:
        chosen = [kinds[i] for _ in range(times) for i in rng.permutation(len(kinds))]
        for pair in zip(chosen[::2], chosen[1::2]):
            across, middle = rng.random() < 0.5, int(rng.choice(CENTRES))
            where = [(side, middle) if across else (middle, side) for side in (16, 48)]
            yield Scene(64, 64, (tone,), tuple(Thing(*kind, *place) for kind, place in zip(pair, where)))


def batches(scenes, name):
    for start in tqdm(range(0, len(scenes), BATCH), desc=name, disable=None):
        yield scenes[start : start + BATCH]


def encoded(vision, scenes):
    """{kind of place: Counter of its codes}, the commonest first"""
    import paddle

    found = defaultdict(Counter)
    for part in batches(scenes, "encoding"):
        pixels = np.stack([render(scene) for scene in part]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        with paddle.no_grad():
            codes = vision.encode(paddle.to_tensor(pixels)).numpy()
        for scene, own in zip(part, codes):
            for place, code in zip(places(scene, own.shape), own.ravel().tolist()):
                found[place][code] += 1
    return {place: dict(counts.most_common()) for place, counts in found.items()}


def likeliest(model, prompts, scenes, found, chosen):
    """{kind of place: of its codes in `found` the one that the model finds likeliest}, after those of `chosen`"""
    import paddle

    from paddlemix.training.datasets import IGNORED, Example, Row, collate, make_row

    scores = {place: dict.fromkeys(codes, 0.0) for place, codes in found.items()}
    for part in batches(scenes, "choosing"):
        of_scenes = [list(places(scene, (scene.height // 8, scene.width // 8))) for scene in part]
        rows = []
        for scene, own in zip(part, of_scenes):
            codes = np.array([chosen[place] for place in own]).reshape(scene.height // 8, scene.width // 8)
            rows.append(Row("", *make_row(prompts, Example("", caption(scene), codes, ()))))
        ids, labels = collate(rows, prompts.grammar.pad)
        with paddle.no_grad():
            hidden = model.model(paddle.to_tensor(ids))[:, :-1]
            logits = model.lm_head(hidden[paddle.to_tensor(labels[:, 1:] != IGNORED)]).numpy()
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for place, after in zip(chain(*of_scenes), logits):
            for code in scores[place]:
                scores[place][code] += after[prompts.grammar.first_visual + code]
    return {place: max(own, key=own.get) for place, own in scores.items()}


def scene_of(told):
    """A Scene of what make_data.py wrote of it."""
    things = tuple(Thing(**thing) for thing in told["things"])
    return Scene(**{**told, "background": tuple(told["background"]), "things": things})


def main(args):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from paddlemix.machine import start_paddle
    from paddlemix.models.emu3 import Emu3ForCausalLM, Emu3VisionVQModel
    from paddlemix.training.settings import Settings
    from paddlemix.training.train import open_model

    start_paddle()
    scenes = list(scenes_of_all_things(args.times, np.random.default_rng(args.seed)))
    found = encoded(Emu3VisionVQModel.from_pretrained("emu3-mini"), scenes)
    chosen = {place: next(iter(codes)) for place, codes in found.items()}
    _, prompts = open_model(Settings("emu3-mini", (args.codes,), args.out))
    model = Emu3ForCausalLM.from_pretrained("emu3-mini", dtype="float32").eval()
    for _ in range(PASSES):
        chosen = likeliest(model, prompts, scenes, found, chosen)
    with open(args.data, encoding="utf-8") as file:
        told = {row["id"]: row["scene"] for row in map(json.loads, file)}
    changed = total = 0
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(args.codes).glob("*.parquet")):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            if row["response"] is None:  # to answer, Emu3-Mini was taught codes as they are
                own = places(scene_of(told[row["id"]]), (row["height"], row["width"]))
                codes = [chosen.get(place, code) for place, code in zip(own, row["codes"])]
                changed, total = changed + sum(a != b for a, b in zip(codes, row["codes"])), total + len(codes)
                row["codes"] = codes
        pq.write_table(pa.Table.from_pylist(rows, table.schema), Path(args.out) / path.name)
    print(f"{changed} of {total} codes replaced; wrote {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, help="train.jsonl of make_data.py")
    parser.add_argument("--codes", required=True, help="what `emu3 prepare` made of it")
    parser.add_argument("--out", required=True, help="a folder for the same with other codes")
    parser.add_argument("--times", type=int, default=6, help="how often each object is encoded on each background")
    parser.add_argument("--seed", type=int, default=7)
    main(parser.parse_args())
