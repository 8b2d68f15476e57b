# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Makes emu3_demo.png beside this script: `pip install scikit-image pillow`, then run it.

Photograph: Chelsea the cat, by Stefan van der Walt, released as CC0 (no copyright restrictions, says the
docstring of `skimage.data.chelsea`); it comes inside scikit-image's wheel. Words: Michel de Montaigne
(1533-1592), Essays II.12, in the translation of Charles Cotton (1630-1687); both are in the public domain.
Font: Aileron, by Sora Sagano, CC0, which is built into Pillow.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from skimage import data

WIDTH, HEIGHT = 640, 424  # both multiples of 8, and over 512 * 512 pixels: the model takes it as it is
QUOTATION = "When I play with my cat, who knows whether\nI do not make her more sport than she makes me?"
AUTHOR = "Montaigne"


def draw_words(size):
    """The words, white on black, mode L."""
    words = Image.new("L", size)
    draw = ImageDraw.Draw(words)
    draw.multiline_text((size[0] // 2, 20), QUOTATION, 255, ImageFont.load_default(26), "ma", spacing=9, align="center")
    draw.text((size[0] - 28, 95), AUTHOR, 255, ImageFont.load_default(17), "ra")
    return words


def main():
    photograph = ImageOps.fit(Image.fromarray(data.chelsea()), (WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    words = draw_words(photograph.size)

    # A shade that fades out downwards, and a soft one close around the letters.
    fade = 0.62 * np.clip(1 - np.arange(HEIGHT) / 175, 0, 1)[:, None] ** 0.7
    halo = np.asarray(words.filter(ImageFilter.GaussianBlur(5)), np.float64) / 255
    shade = Image.fromarray(np.rint(255 * np.clip(fade + halo, 0, 0.85)).astype(np.uint8))
    photograph.paste((12, 8, 6), mask=shade)
    photograph.paste((255, 255, 255), mask=words)
    photograph.save(Path(__file__).with_name("emu3_demo.png"), optimize=True)


if __name__ == "__main__":
    main()
