# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Text-to-image step by step, with a line of progress and a preview: python examples/generate.py"""

from paddlemix.pipelines import Emu3Pipeline

PROMPT = "a large red circle on a white background."


def main():
    emu3 = Emu3Pipeline.from_pretrained("emu3-mini")
    generation = emu3.generate_steps(PROMPT, seed=1)
    height, width = generation.sizes[0]
    print(f"{width} x {height} pixels, {generation.tokens} tokens")
    tokens = rows = 0
    for gained in generation:  # one forward pass
        tokens += gained
        if generation.rows_drawn > rows:
            rows = generation.rows_drawn
            generation.images()[0].save("preview.png")
            print(f"\r{tokens} tokens, {rows} rows", end="", flush=True)
    generation.images()[0].save("generated.png")
    print(f"\nwrote generated.png after {generation.forward_passes} forward passes")


if __name__ == "__main__":
    main()
