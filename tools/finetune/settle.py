# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Replace the codes of prepared drawings by the commonest of each kind of place, as Emu3-Mini was taught them.

A code of Emu3-Mini tells mostly of its place and a little of the whole picture, too little to be seen. Emu3-Mini draws
with the commonest code of each kind of place; others are so unlikely to it that a fine-tuning on codes as they are
would first have to undo that. The original is trained on codes as they are, and needs none of this.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "mini")]

import numpy as np
from tqdm import tqdm
from world import COLOURS, NEW_COLOURS, NEW_SHAPES, SHAPES, SIZES, TONES, Scene, Thing, places, render

BATCH = 32
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


def commonest_codes(vision, scenes):
    """{kind of place: its commonest code}"""
    import paddle

    counts = defaultdict(Counter)
    for start in tqdm(range(0, len(scenes), BATCH), desc="commonest codes"):
        part = scenes[start : start + BATCH]
        pixels = np.stack([render(scene) for scene in part]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        with paddle.no_grad():
            codes = vision.encode(paddle.to_tensor(pixels)).numpy()
        for scene, own in zip(part, codes):
            for place, code in zip(places(scene, own.shape), own.ravel().tolist()):
                counts[place][code] += 1
    return {place: count.most_common(1)[0][0] for place, count in counts.items()}


def main(args):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from paddlemix.machine import start_paddle
    from paddlemix.models.emu3 import Emu3VisionVQModel

    start_paddle()
    with open(args.data, encoding="utf-8") as file:
        told = {row["id"]: row["scene"] for row in map(json.loads, file)}
    vision = Emu3VisionVQModel.from_pretrained("emu3-mini")
    common = commonest_codes(vision, list(scenes_of_all_things(args.times, np.random.default_rng(args.seed))))
    changed = total = 0
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(args.codes).glob("*.parquet")):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            if row["response"] is not None:  # to answer, Emu3-Mini was taught codes as they are
                continue
            scene = told[row["id"]]
            scene = Scene(**{**scene, "background": tuple(scene["background"]),
                             "things": tuple(Thing(**thing) for thing in scene["things"])})  # fmt: skip
            codes = [common.get(p, c) for p, c in zip(places(scene, (row["height"], row["width"])), row["codes"])]
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
