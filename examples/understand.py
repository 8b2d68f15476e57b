# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Image question answering, the answer printed while it is generated: python examples/understand.py"""

from pathlib import Path

from PIL import Image

import paddlemix
from paddlemix.pipelines import Emu3Pipeline

SCENE = Path(paddlemix.__path__[0]) / "demo_images" / "emu3_scene.png"
QUESTIONS = ["Please describe the image", "What colour is the triangle?", "有几个物体？"]


def main():
    emu3 = Emu3Pipeline.from_pretrained("emu3-mini")
    image = Image.open(SCENE)
    for question in QUESTIONS:
        print(question)
        for new in emu3.understand_steps(image, question):
            print(new[0], end="", flush=True)
        print()
    # several questions in one batch; a list of answers
    print(emu3.understand(image, QUESTIONS))


if __name__ == "__main__":
    main()
