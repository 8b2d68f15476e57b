# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pictures and texts for the tutorial of docs/finetune.md: what Emu3-Mini has never seen.

A shape, the house; a colour, brown; and a question, how large something is. For each picture there are two rows
of JSON: its caption, to draw it, and a conversation about it. Some of the pictures are of scenes that Emu3-Mini knows,
so that it does not forget them. What `held_out` of tools/mini/world.py names is kept for measuring.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mini"))

import numpy as np
from PIL import Image
from world import CANVASES, NEW_COLOURS, NEW_SHAPES, caption, held_out, questions, random_scene, render

NEWS = ("shape", "colour", "both")
SHARES = (0.3, 0.45, 0.25)  # of the scenes with something new
TONE = "white"  # new things stand on it
KNOWN_TURNS = 4  # of a conversation, and a description


def new_scene(rng, things=None, new=None, held=False):
    """A scene of one or two objects on white, of which one has the new shape, the new colour, or both.

    held: whether it is held out; no single object that has both is.
    """
    while True:
        scene = replace(random_scene(rng, things or rng.choice(2, p=(0.3, 0.7)) + 1, CANVASES[0]), background=(TONE,))
        what, which = new or rng.choice(NEWS, p=SHARES), rng.integers(len(scene.things))
        changes = {"shape": NEW_SHAPES[0], "colour": next(iter(NEW_COLOURS))}
        thing = replace(scene.things[which], **{k: v for k, v in changes.items() if what in (k, "both")})
        scene = replace(scene, things=(*scene.things[:which], thing, *scene.things[which + 1 :]))
        if held_out(scene) == held:
            return scene


def known_scene(rng, things=None, held=False):
    """A scene of one or two objects on one tone that Emu3-Mini knows."""
    while True:
        scene = random_scene(rng, things or rng.choice(2, p=(0.3, 0.7)) + 1, CANVASES[0])
        scene = replace(scene, background=scene.background[:1])
        if held_out(scene) == held:
            return scene


def sizes(scene):
    """The new question, of each object: [(question, answer), ...]"""
    shapes = [thing.shape for thing in scene.things]
    names = [t.shape if shapes.count(t.shape) == 1 else f"{t.colour} object" for t in scene.things]
    return [(f"What size is the {name}?", thing.size) for name, thing in zip(names, scene.things)]


def conversation(scene, rng):
    """The new question, and some of those that Emu3-Mini knows: [(question, answer), ...]

    In any order, but a description comes last: it would tell what others ask.
    """
    known, descriptions = [], []
    for kind, *turn in questions(scene):
        (descriptions if kind == "describe" else known).append(tuple(turn))
    turns = [known[i] for i in rng.permutation(len(known))[:KNOWN_TURNS]] + sizes(scene)
    return [turns[i] for i in rng.permutation(len(turns))] + [descriptions[rng.integers(len(descriptions))]]


def main(args):
    rng, folder = np.random.default_rng(args.seed), Path(args.out)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for i in range(args.new + args.known):
            scene = new_scene(rng) if i < args.new else known_scene(rng)
            image = f"images/{i:04d}.png"
            Image.fromarray(render(scene)).save(folder / image)
            messages = [
                {"role": role, "content": text}
                for turn in conversation(scene, rng)
                for role, text in zip(("user", "assistant"), turn)
            ]
            messages[0]["content"] = "<image>" + messages[0]["content"]
            for row in (
                {"id": f"{i:04d}-draw", "image": image, "text": caption(scene, rng=rng)},
                {"id": f"{i:04d}-ask", "images": [image], "messages": messages},
            ):
                file.write(json.dumps({**row, "scene": asdict(scene)}) + "\n")
    print(f"wrote {args.new + args.known} images and {2 * (args.new + args.known)} rows to {folder}/train.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="finetune_run/data", help="a folder for train.jsonl and images/")
    parser.add_argument("--new", type=int, default=700, help="images with the new shape or colour")
    parser.add_argument("--known", type=int, default=300, help="images of what Emu3-Mini knows, against forgetting")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
