# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Requests that join a running batch, as in a service: python examples/batch.py"""

from paddlemix.models.emu3 import Batch, Drawing
from paddlemix.models.emu3.sampling import Sampling
from paddlemix.pipelines import Emu3Pipeline

PROMPTS = ["a large red circle on a white background.", "a small blue cross", "一个绿色三角形，黑色背景。"]


def main():
    emu3 = Emu3Pipeline.from_pretrained("emu3-mini")
    processor, size = emu3.processor, {"image_area": emu3.config.image_area}
    negative = processor("", **size).input_ids[0]

    def request(number):
        prompt, sampling = processor(PROMPTS[number], **size), Sampling(temperature=0.5, seed=number)
        return Drawing(prompt.input_ids[0], prompt.image_size[0], processor.grammar, negative, 1.5, sampling)

    names, batch, steps = {}, Batch(emu3.model), 0
    while batch or len(names) < len(PROMPTS):
        if steps % 20 == 0 and len(names) < len(PROMPTS):  # a request comes; the others go on
            drawing = request(len(names))
            names[drawing] = f"request_{len(names)}.png"
            batch.join(drawing)
        for drawing, _ in batch.step():  # one forward pass for all
            if drawing.is_done:
                processor.decode_image(drawing.codes()).save(names[drawing])
                print(f"step {steps}: wrote {names[drawing]}")
        steps += 1


if __name__ == "__main__":
    main()
