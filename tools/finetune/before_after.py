# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Emu3-Mini before and after the tutorial of docs/finetune.md, on scenes that no training has seen.

Images are read by tools/mini/recognise.py, which knows nothing of the model; answers count as right word for word.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "mini")]

import numpy as np
from evaluate import compare
from make_data import NEWS, known_scene, new_scene, sizes
from PIL import Image
from recognise import recognise
from world import NEW_COLOURS, NEW_SHAPES, caption, questions, render

NAMES = {"shape": "houses", "colour": "brown objects", "both": "brown houses"}
SHOWN = 3  # drawings of each kind in the picture
LONGEST = 48  # tokens of an answer; Emu3-Mini does not end those to questions that it does not know


def held_out_scenes(args):
    """{kind: scenes}: those of NEWS, and "known" ones; half of each have one object, half two.

    Brown houses have an object beside them: none is held out that stands alone.
    """
    rng, numbers = np.random.default_rng(args.seed), [1 + i % 2 for i in range(args.count)]
    scenes = {kind: [new_scene(rng, 2 if kind == "both" else n, kind, True) for n in numbers] for kind in NEWS}
    return {**scenes, "known": [known_scene(rng, n, True) for n in numbers]}


def held_out_questions(scenes, seed):
    """{kind: [(scene, question, answer), ...]}"""
    rng = np.random.default_rng(seed)

    def any_known(scene, about_new=False):
        asked = [(q, a) for _, q, a in questions(scene) if not about_new or is_new(q) or is_new(a)]
        return asked[rng.integers(len(asked))]

    def size(scene):  # rather of something small, so that about half are
        asked = sizes(scene)
        return next((a for a in asked if a[1] == "small"), asked[0])

    new = [scenes[NEWS[i % 3]][i] for i in range(len(scenes["known"]))]
    return {
        "size": [(s, *size(s)) for s in new],
        "about new": [(s, *any_known(s, about_new=True)) for s in new],
        "known": [(s, *any_known(s)) for s in scenes["known"]],
    }


def is_new(text):
    return any(word in text for word in (*NEW_SHAPES, *NEW_COLOURS))


def shows_new(scene, read):
    """Whether what is new of a scene is there, in its shape and colour."""
    seen = {(t.shape, t.colour) for t in read.things}
    return all((t.shape, t.colour) in seen for t in scene.things if is_new(f"{t.shape} {t.colour}"))


def draw(emu3, scenes, seed):
    """[(image, Scene that is read from it), ...]"""
    images = emu3.generate([caption(scene) for scene in scenes], ratio="1:1", seed=seed)
    return [(image, recognise(np.asarray(image), new=True)) for image in images]


def answered(emu3, asked):
    """For each (scene, question, answer) whether the model answers so."""
    images, texts = [Image.fromarray(render(scene)) for scene, _, _ in asked], [question for _, question, _ in asked]
    texts = emu3.understand(images, texts, max_new_tokens=LONGEST)
    return [text == answer for text, (_, _, answer) in zip(texts, asked)]


def measure(emu3, scenes, asked, seed):
    """({line of the table: for each drawing or answer, whether it is right}, some drawings)"""
    lines, some = {}, []
    for kind, name in NAMES.items():
        drawn = draw(emu3, scenes[kind], seed)
        lines[f"{name} drawn"] = [shows_new(scene, read) for scene, (_, read) in zip(scenes[kind], drawn)]
        lines[f"images of {name} right in all"] = right_in_all(scenes[kind], drawn)
        some += [image for image, _ in drawn[:SHOWN]]
    lines["'What size is the ...?' answered"] = answered(emu3, asked["size"])
    lines["other questions about what is new answered"] = answered(emu3, asked["about new"])
    lines["known scenes drawn right in all"] = right_in_all(scenes["known"], draw(emu3, scenes["known"], seed))
    lines["known questions answered"] = answered(emu3, asked["known"])
    return lines, some


def right_in_all(scenes, drawn):
    return [compare(scene, read)["right"] for scene, (_, read) in zip(scenes, drawn)]


def contact_sheet(rows):
    """One image of rows of images of one size, twice as large, with white between."""
    edge = ((2, 2), (2, 2), (0, 0))
    tiles = [[np.pad(np.asarray(image), edge, constant_values=255) for image in row] for row in rows]
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in tiles])
    return Image.fromarray(sheet.repeat(2, axis=0).repeat(2, axis=1))


def main(args):
    from paddlemix.pipelines import Emu3Pipeline

    scenes = held_out_scenes(args)
    asked = held_out_questions(scenes, args.seed)
    columns, rows = [], []
    for path in (None, args.lora_path):
        emu3 = Emu3Pipeline.from_pretrained(args.model_path, dtype="float32", lora_path=path)
        lines, some = measure(emu3, scenes, asked, args.seed)
        columns.append(lines)
        rows.append(some)
    print(f"| of {args.count} each | before | after |\n|---|---|---|")
    for name, before in columns[0].items():
        print(f"| {name} | {100 * np.mean(before):.0f} % | {100 * np.mean(columns[1][name]):.0f} % |")
    if args.picture:
        contact_sheet(rows).save(args.picture, optimize=True)
        print(f"{args.picture}: above before, below after, of the prompts")
        print(*(f"  {caption(scene)}" for kind in NEWS for scene in scenes[kind][:SHOWN]), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_path", default="emu3-mini")
    parser.add_argument("--lora_path", required=True, help="what `emu3 train --lora` wrote")
    parser.add_argument("--count", type=int, default=60, help="drawings and questions of each line")
    parser.add_argument("--picture", help="a PNG for some of the drawings")
    parser.add_argument("--seed", type=int, default=100)
    main(parser.parse_args())
