# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Read a picture back into a scene by measuring it: hue, connected regions, outlines. No model, no renderer.

Only the names are shared with world.py; what a shape looks like is said here a second time, as an outline.
"""

import colorsys
from functools import lru_cache

import numpy as np
from scipy import ndimage
from world import COLOURS, NEW_SHAPES, SHAPES, TONES, Scene, Thing

HUES = {name: colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0] for name, rgb in COLOURS.items()}
LEAST_CHROMA = 55  # of 255: below it a pixel is background
APART = 12  # pixels from middle to middle, at least, of two objects
BROWN = 180  # of 255: a red or orange pixel that is darker is brown
LEAST_PIXELS = 40  # a smaller region is a blemish
SIDES = range(16, 37, 2)  # pixels a side that an object may have
LARGE = 26  # from so many on it is large

OUTLINES = {  # corners of the unit square's inscribed shape; a circle is a polygon of many corners
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "house": [(0.5, 0), (1, 0.5), (1, 1), (0, 1), (0, 0.5)],
    "cross": [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)],
}


def recognise(picture, new=False):
    """uint8 [height, width, 3] -> Scene. Regions that no object makes are left out or given the nearest name.

    new: houses and brown may be in it.
    """
    pixels = picture.astype(np.float32)
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    nearest, colours, shapes = _nearest_hue(pixels, chroma), [*HUES], SHAPES
    if new:
        dark = (pixels.max(axis=2) < BROWN) & np.isin(nearest, [colours.index(c) for c in ("red", "orange")])
        nearest, colours, shapes = np.where(dark, len(colours), nearest), [*colours, "brown"], SHAPES + NEW_SHAPES
    regions = []
    for i, colour in enumerate(colours):
        labels, count = ndimage.label((nearest == i) & (chroma > LEAST_CHROMA))
        regions += [(labels == k, colour) for k in range(1, count + 1)]
    things = []
    for region, colour in sorted(regions, key=lambda r: -r[0].sum()):
        if region.sum() >= LEAST_PIXELS:
            thing = _thing(ndimage.binary_dilation(region, iterations=2) & (chroma > 0), colour, chroma, shapes)
            # an edge of another hue belongs to the object that it lies on
            if all(max(abs(thing.x - t.x), abs(thing.y - t.y)) > APART for t in things):
                things.append(thing)
    things.sort(key=lambda t: (t.y // 16, t.x))
    return Scene(*picture.shape[:2], _background(pixels.mean(axis=2), chroma), tuple(things))


def _nearest_hue(pixels, chroma):
    """Index into COLOURS of the nearest hue, [height, width]."""
    red, green, blue = pixels.transpose(2, 0, 1)
    safe = np.maximum(chroma, 1e-3)
    hue = np.where(
        pixels.argmax(axis=2) == 0, (green - blue) / safe % 6,
        np.where(pixels.argmax(axis=2) == 1, (blue - red) / safe + 2, (red - green) / safe + 4),
    ) / 6  # fmt: skip
    distance = abs(hue[..., None] - np.array(list(HUES.values())))
    return np.minimum(distance, 1 - distance).argmin(axis=-1)


def _thing(region, colour, chroma, shapes):
    """The shape and size whose outline, laid on the region's middle, agrees best."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    middle = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    seen = np.where(region, chroma, 0)
    seen = (seen / np.percentile(seen[region], 75)).clip(0, 1)  # how much of each pixel is the object
    scores = {
        (shape, side): _agreement(seen, ideal(shape, side, middle, seen.shape)) for shape in shapes for side in SIDES
    }
    shape, side = max(scores, key=scores.get)
    return Thing(shape, colour, "large" if side >= LARGE else "small", *(int(round(v)) for v in middle[::-1]))


def _agreement(a, b):
    """What two masks of values 0 to 1 have in common, of all they cover."""
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


@lru_cache(maxsize=20000)
def ideal(shape, side, middle, canvas):
    """The mask of a shape `side` pixels wide and high, values 0 to 1: [height, width]"""
    # four samples a pixel and axis; 0 to 1 across the shape's box
    y, x = (((np.arange(4 * n) + 0.5) / 4 - m) / side + 0.5 for n, m in zip(canvas, middle))
    x, y = x[None, :], y[:, None]
    if shape in ("circle", "ring"):
        square = (2 * x - 1) ** 2 + (2 * y - 1) ** 2
        inside = (square <= 1) & (square >= (0.25 if shape == "ring" else 0))
    else:
        corners = np.array(OUTLINES[shape], np.float64)
        corners /= corners.max()
        inside = np.zeros([y.size, x.size], bool)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0)):  # crossings of a ray, even or odd
            if y0 != y1:
                inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
    return inside.reshape(canvas[0], 4, canvas[1], 4).mean(axis=(1, 3)).astype(np.float32)


def _background(brightness, chroma):
    """One tone, or two where upper and lower part differ."""
    names, half = [], brightness.shape[0] // 2
    for part, colourful in ((brightness[: half - 6], chroma[: half - 6]), (brightness[half + 4 :], chroma[half + 4 :])):
        grey = part[colourful < LEAST_CHROMA]
        value = np.median(grey) if grey.size else 0
        names.append(min(TONES, key=lambda name: abs(TONES[name] - value)))
    return tuple(dict.fromkeys(names))
