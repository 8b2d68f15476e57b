# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The vision tokenizer alone: an image to codes, some of them changed, and back: python examples/tokenizer.py"""

from pathlib import Path

import paddle
from PIL import Image

import paddlemix
from paddlemix.models.emu3 import Emu3VisionVQModel
from paddlemix.processors import Emu3VisionVQImageProcessor

SCENE = Path(paddlemix.__path__[0]) / "demo_images" / "emu3_scene.png"


def main():
    vision = Emu3VisionVQModel.from_pretrained("emu3-mini")
    processor = Emu3VisionVQImageProcessor.from_pretrained("emu3-mini")
    pixels = processor(Image.open(SCENE), return_tensors="pd")["pixel_values"]  # float32 [1, 3, H, W] in [-1, 1]
    with paddle.no_grad():
        codes = vision.encode(pixels)  # int64 [1, H/8, W/8]
        print(f"{pixels.shape[3]} x {pixels.shape[2]} pixels, {codes.shape[1]} x {codes.shape[2]} codes")
        print(codes[0].numpy())
        half = codes.shape[2] // 2
        codes = paddle.concat([codes[:, :, half:], codes[:, :, :half]], axis=2)  # the halves change places
        edited = processor.postprocess(vision.decode(codes))["pixel_values"][0]
    edited.save("edited.png")
    print("wrote edited.png")


if __name__ == "__main__":
    main()
