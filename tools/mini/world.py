# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A small world with ground truth: scenes of one to three objects, their pictures, captions and questions.

Objects stand with their centres on multiples of 8 pixels, so that the same object always falls on the vision
tokenizer's grid in the same way; no two objects of a scene share a colour. Backgrounds are grey tones, objects
are not, which leaves an object's hue what it is where an edge mixes the two.
"""

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (225, 25, 25), "orange": (255, 120, 0), "yellow": (250, 225, 0), "green": (20, 160, 45),
    "cyan": (0, 205, 220), "blue": (30, 70, 225), "purple": (135, 30, 190), "pink": (255, 105, 180),
}  # fmt: skip
# which Emu3-Mini has never seen: docs/finetune.md teaches it these
NEW_SHAPES = ("house",)
NEW_COLOURS = {"brown": (140, 85, 40)}
SIZES = {"small": 22, "large": 30}  # pixels a side
TONES = {"white": 245, "grey": 140, "black": 15}
TWO_TONES = (("white", "grey"), ("grey", "black"), ("black", "white"))  # above, below
RELATIONS = ("left of", "above")  # each pair is put in the order that makes one of these true
CANVASES = ((64, 64), (56, 72), (72, 56))  # height, width: 1:1, 4:3 and 3:4 of the same area
BOX = 32  # an object's box, with its margin
SUPERSAMPLING = 8

CHINESE = {
    "circle": "圆形", "square": "方形", "triangle": "三角形", "diamond": "菱形", "cross": "十字", "ring": "圆环",
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "cyan": "青色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "white": "白色", "grey": "灰色", "black": "黑色",
    "small": "小", "large": "大", "left of": "左边", "right of": "右边", "above": "上面", "below": "下面",
    1: "一个", 2: "两个", 3: "三个",
}  # fmt: skip
NUMBERS = {1: "one", 2: "two", 3: "three"}
OPPOSITE = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """One object; x and y are its centre in pixels."""

    shape: str
    colour: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """`background` names one tone, or two: above and below the middle."""

    height: int
    width: int
    background: tuple
    things: tuple


def relation(a, b):
    """What a is of b: one of RELATIONS or its opposite; None where they stand slanted."""
    if abs(a.x - b.x) >= 16 and abs(a.y - b.y) <= 8:
        return "left of" if a.x < b.x else "right of"
    if abs(a.y - b.y) >= 16 and abs(a.x - b.x) <= 8:
        return "above" if a.y < b.y else "below"
    return None


# --- scenes ----------------------------------------------------------------------------------------------


def held_out(scene):
    """Whether training never sees this: the one place that says which combinations are kept for measuring.

    One object: an eighth of all (size, colour, shape, background). More: an eighth of all (colour, shape,
    relation, colour, shape), if any two objects of the scene are one of them.
    """
    things = scene.things
    if len(things) == 1:
        return _eighth(things[0].size, things[0].colour, things[0].shape, *scene.background)
    pairs = [(a, relation(a, b), b) for a in things for b in things]
    return any(_eighth(a.colour, a.shape, r, b.colour, b.shape) for a, r, b in pairs if r in RELATIONS)


def _eighth(*words):
    return zlib.crc32(" ".join(words).encode()) % 8 == 0


def random_scene(rng, num_things=None, canvas=None, held=None):
    """A scene; `held` True or False asks for one that is held out or is not."""
    while True:
        scene = _random_scene(rng, num_things or rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]), canvas)
        if held is None or held_out(scene) == held:
            return scene


def _random_scene(rng, num_things, canvas):
    height, width = canvas or CANVASES[rng.choice(3, p=[0.6, 0.2, 0.2])]
    xs, ys = _centres(width), _centres(height)
    sizes = [str(rng.choice(list(SIZES))) for _ in range(num_things)]
    if num_things == 1:
        places = [(rng.choice(xs), rng.choice(ys))]
    elif num_things == 2:
        across = rng.random() < 0.5
        places = [(x, ys[k]) for k in [rng.integers(3)] for x in (xs[0], xs[2])]
        if not across:
            places = [(xs[k], y) for k in [rng.integers(3)] for y in (ys[0], ys[2])]
        if min(width if across else height, 64) < 64:  # two large ones do not fit a short side
            sizes = ["small"] * 2
    else:
        corners = [(x, y) for y in (ys[0], ys[2]) for x in (xs[0], xs[2])]
        places = [corners[i] for i in sorted(rng.permutation(4)[:3])]
        if min(height, width) < 64:
            sizes = ["small"] * 3
    colours = rng.permutation(list(COLOURS))[:num_things]
    things = tuple(
        Thing(str(rng.choice(SHAPES)), str(c), s, int(x), int(y)) for c, s, (x, y) in zip(colours, sizes, places)
    )
    tones = list(TONES)
    background = TWO_TONES[rng.integers(3)] if rng.random() < 0.25 else (tones[rng.integers(3)],)
    return Scene(height, width, background, things)


def _centres(side):
    return 16, side // 16 * 8, side - 16


# --- pictures --------------------------------------------------------------------------------------------


@cache
def coverage(shape, size):
    """How much of each pixel of a BOX x BOX square an object covers, float32 [BOX, BOX]."""
    n = BOX * SUPERSAMPLING
    half = SIZES[size] / 2
    u = ((np.arange(n) + 0.5) / SUPERSAMPLING - BOX / 2) / half  # -1 to 1 across the object
    x, y = u[None, :], u[:, None]
    radius = np.hypot(x, y)
    inside = {
        "circle": radius <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 1,
        "triangle": (abs(x) <= (y + 1) / 2) & (abs(y) <= 1),
        "diamond": abs(x) + abs(y) <= 1,
        "cross": (np.minimum(abs(x), abs(y)) <= 1 / 3) & (np.maximum(abs(x), abs(y)) <= 1),
        "ring": (radius <= 1) & (radius >= 0.5),
        "house": (abs(x) - y <= 1) & (np.maximum(abs(x), abs(y)) <= 1),
    }[shape]
    return inside.reshape(BOX, SUPERSAMPLING, BOX, SUPERSAMPLING).mean(axis=(1, 3)).astype(np.float32)


def render(scene):
    """The picture: uint8 [height, width, 3]."""
    colours = {**COLOURS, **NEW_COLOURS}
    picture = np.empty([scene.height, scene.width, 3], np.float32)
    picture[:] = TONES[scene.background[0]]
    picture[scene.height // 16 * 8 :] = TONES[scene.background[-1]]
    for thing in scene.things:
        top, left = thing.y - BOX // 2, thing.x - BOX // 2
        alpha = coverage(thing.shape, thing.size)[:, :, None]
        part = picture[top : top + BOX, left : left + BOX]
        part += alpha * (np.float32(colours[thing.colour]) - part)
    return picture.round().astype(np.uint8)


def places(scene, shape):
    """What is to be seen at each code of a scene: objects within BOX and where they stand, and the background."""
    height, width = shape
    horizon = scene.height // 16
    for row in range(height):
        for column in range(width):
            x, y = 8 * column, 8 * row
            near = [
                (t.shape, t.colour, t.size, t.x - x, t.y - y)
                for t in scene.things
                if max(abs(t.x - x - 4), abs(t.y - y - 4)) < BOX // 2
            ]
            level = min(max(row - horizon, -2), 1) if len(scene.background) == 2 else 0
            yield scene.background, level, tuple(sorted(near))


# --- words -----------------------------------------------------------------------------------------------


def name(thing, chinese, with_size=True):
    """As in "a large red circle", "一个大的红色圆形"."""
    if chinese:
        size = CHINESE[thing.size] + "的" if with_size else ""
        return "一个" + size + CHINESE[thing.colour] + CHINESE[thing.shape]
    words = [thing.size] * with_size + [thing.colour, thing.shape]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _background(scene, chinese):
    if chinese:
        return "和".join(CHINESE[t] for t in scene.background) + "背景"
    return f"a {' and '.join(scene.background)} background"


def caption(scene, chinese=False, rng=None):
    """What a picture shows. Without `rng` the one full form, with it one of several, less or more detailed.

    A caption that leaves out size or background is true of more than this scene.
    """
    things, full = list(scene.things), rng is None
    with_size = [full or rng.random() < 0.5 for _ in things]
    with_background = full or rng.random() < 0.6
    how = relation(*things) if len(things) == 2 else None
    if how and not full and rng.random() < 0.5:
        things, how = things[::-1], OPPOSITE[how]
    if len(things) == 3 and not full:
        things = [things[i] for i in rng.permutation(3)]
    names = [name(t, chinese, s) for t, s in zip(things, with_size)]
    if chinese:
        text = f"{names[0]}在{names[1]}的{CHINESE[how]}" if how else "、".join(names[:-1])
        text += "" if how else ("和" if len(names) > 1 else "") + names[-1]
        return text + ("，" + _background(scene, True) if with_background else "") + "。"
    if how:
        text = f"{names[0]} {how} {names[1]}"
    else:
        text = ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
    text += " on " + _background(scene, False) if with_background else ""
    return text + ("." if full or rng.random() < 0.7 else "")


def questions(scene, chinese=False):
    """All questions that the scene answers: (kind, question, answer). Answers have one form."""
    things = scene.things
    asked = []
    if chinese:
        asked += [("describe", q, caption(scene, True)) for q in ("请描述这张图片", "图片里有什么？")]
        asked.append(("count", "有几个物体？", CHINESE[len(things)]))
        asked.append(("background", "背景是什么颜色？", "和".join(CHINESE[t] for t in scene.background)))
    else:
        describe = ("Please describe the image", "Please describe the image.", "What is in the picture?")
        asked += [("describe", q, caption(scene)) for q in describe]
        asked.append(("count", "How many objects are there?", NUMBERS[len(things)]))
        asked.append(("background", "What colour is the background?", " and ".join(scene.background)))
    for thing in things:
        shape, colour = (CHINESE[w] if chinese else w for w in (thing.shape, thing.colour))
        if sum(t.shape == thing.shape for t in things) == 1:
            question = f"{shape}是什么颜色？" if chinese else f"What colour is the {shape}?"
            asked.append(("colour", question, colour))
        question = f"{colour}的物体是什么形状？" if chinese else f"What shape is the {colour} object?"
        asked.append(("shape", question, shape))
        for other in things:
            how = relation(other, thing)
            if how:
                question = f"{colour}物体的{CHINESE[how]}是什么？" if chinese else f"What is {how} the {colour} object?"
                asked.append(("relation", question, name(other, chinese, with_size=False)))
    return asked
