# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Measure Emu3-Mini, run by this package, on scenes that its training left out.

Drawings are read by recognise.py, which knows nothing of the model, and compared with what their prompts say.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image
from recognise import recognise
from tqdm import tqdm
from world import CANVASES, caption, questions, random_scene, relation, render

BATCH = 55  # drawings or answers at a time
NUMBERS = {1: "one object", 2: "two objects", 3: "three objects"}
HEADS = ("prompts of", "guidance", "drawn", "count", "colour", "shape", "shape + colour", "relation", "right")


def held_out_scenes(count, seed, things=None):
    """Three of five square, the others 4:3 and 3:4."""
    rng = np.random.default_rng(seed)
    return [random_scene(rng, things, CANVASES[(0, 0, 0, 1, 2)[i % 5]], held=True) for i in range(count)]


def batches(items, name):
    for start in tqdm(range(0, len(items), BATCH), desc=name, leave=False):
        yield start, items[start : start + BATCH]


def compare(scene, read):
    """What of a scene a picture shows, True or False each. Sizes, places and the background do not count.

    Captions of one and of three objects name no relation: there it is None.
    """
    asked, seen = ({t.colour: t for t in s.things} for s in (scene, read))
    pair = [seen.get(t.colour) for t in scene.things]
    result = {
        "count": len(read.things) == len(asked),
        "colour": sorted(t.colour for t in read.things) == sorted(asked),
        "shape": sorted(t.shape for t in read.things) == sorted(t.shape for t in scene.things),
        "shape + colour": all(t and t.shape == asked[t.colour].shape for t in pair),
        "relation": None if len(pair) != 2 else None not in pair and relation(*pair) == relation(*scene.things),
    }
    return {**result, "right": False not in result.values()}


def measure_drawings(model, processor, scenes, guidance, sampling, seed):
    """`compare` for a drawing of each scene's caption, in English or Chinese, long or short."""
    from paddlemix.models.emu3 import Sampling, generate_images
    from paddlemix.processors.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT

    rng, results = np.random.default_rng(seed), []
    for start, part in batches(scenes, f"drawing, guidance {guidance:g}"):
        prompts = [caption(s, rng.random() < 0.3, rng) for s in part]
        size = {"ratio": [f"{s.width}:{s.height}" for s in part], "image_area": model.config.image_area}
        positive = processor([p + POSITIVE_PROMPT for p in prompts], **size)
        negative = processor([NEGATIVE_PROMPT] * len(part), **size)["input_ids"]
        drawn = generate_images(
            model, positive["input_ids"], [tuple(s) for s in positive["image_size"]], processor.grammar, negative,
            guidance, Sampling(seed=seed + start, **sampling),
        )  # fmt: skip
        for scene, codes in zip(part, drawn.codes):
            results.append(compare(scene, recognise(np.asarray(processor.decode_image(codes)))))
    return results


def measure_answers(model, processor, scenes, seed):
    """{kind of question: for each, whether the answer is word for word what the scene says}"""
    from paddlemix.models.emu3 import generate_text

    rng, right = np.random.default_rng(seed), {}
    for start, part in batches(scenes, "answering"):
        asked = []
        for i, scene in enumerate(part, start):
            every = questions(scene, chinese=i % 3 == 2)
            kinds = sorted({kind for kind, _, _ in every})
            every = [one for one in every if one[0] == kinds[i % len(kinds)]]
            asked.append(every[rng.integers(len(every))])
        images = [Image.fromarray(render(s)) for s in part]
        prompts = processor([question for _, question, _ in asked], images, mode="U")["input_ids"]
        for (kind, _, answer), ids in zip(asked, zip(*generate_text(model, prompts, 40))):
            text = processor.tokenizer.decode([i for i in ids if i is not None], skip_special_tokens=True)
            right.setdefault(kind, []).append(text == answer)
    return right


def there_and_back(processor, picture):
    """(PSNR in dB, the codes, the picture that they give, uint8 [height, width, 3])"""
    from paddlemix.processors.image_processing_emu3 import psnr

    pixels = processor.image_processor(picture)["pixel_values"]
    before = np.asarray(processor.image_processor.postprocess(pixels)["pixel_values"][0])
    codes = processor.tokenize_image([picture])[0]
    after = np.asarray(processor.decode_image(codes))
    return psnr(before, after), codes, after


def measure_vision(processor, scenes):
    """Lines that tell the PSNR of scenes and of the demo photograph, and how much of the codebook scenes use."""
    ratios, right, counts = [], [], np.zeros(processor.grammar.codebook_size)
    for scene in tqdm(scenes, desc="there and back", leave=False):
        ratio, codes, after = there_and_back(processor, Image.fromarray(render(scene)))
        ratios.append(ratio)
        right.append(compare(scene, recognise(after))["right"])
        counts += np.bincount(codes.ravel(), minlength=len(counts))
    photograph = Image.open(ROOT / "paddlemix" / "demo_images" / "emu3_demo.png")
    ratio, _, after = there_and_back(processor, photograph)
    share = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-(share * np.log(share)).sum())
    return [
        f"{len(scenes)} scenes there and back: {np.mean(ratios):.2f} dB, {percent(right)} still read right",
        f"demo photograph at {after.shape[1]} x {after.shape[0]} pixels: {ratio:.2f} dB",
        f"codebook: {len(share)} of {len(counts)} codewords used, perplexity {perplexity:.0f}",
    ]


def percent(values):
    values = [v for v in values if v is not None]
    return f"{100 * np.mean(values):.1f} %" if values else ""


def table_row(*cells):
    return "".join(f"{cell:<15}" if i == 0 else f"{cell:>{max(len(HEADS[i]), 7) + 2}}" for i, cell in enumerate(cells))


def shares(results):
    return [percent([r[key] for r in results]) for key in results[0]]


def main(args):
    from paddlemix.machine import start_paddle
    from paddlemix.models.emu3 import Emu3ForCausalLM
    from paddlemix.processors import Emu3Processor

    start_paddle()
    processor = Emu3Processor.from_pretrained(args.model_path, args.vq_model_path)
    model = Emu3ForCausalLM.from_pretrained(args.model_path)
    print(*measure_vision(processor, held_out_scenes(3 * args.count, args.seed)), sep="\n", flush=True)

    right = measure_answers(model, processor, held_out_scenes(3 * args.count, args.seed), args.seed)
    every = sum(right.values(), [])
    kinds = ", ".join(f"{kind} {percent(values)}" for kind, values in sorted(right.items()))
    print(f"{len(every)} answers: {percent(every)} right ({kinds})", flush=True)

    sampling = {"top_k": args.top_k, "temperature": args.temperature}
    print(table_row(*HEADS))
    for guidance in (args.guidance_scale, 1.0):
        level, every = f"{guidance:g}" if guidance != 1 else "none", []
        for things, name in NUMBERS.items():
            scenes = held_out_scenes(args.count, args.seed + things, things)
            results = measure_drawings(model, processor, scenes, guidance, sampling, args.seed)
            print(table_row(name, level, len(results), *shares(results)), flush=True)
            every += results
        print(table_row("all", level, len(every), *shares(every)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_path", default="emu3-mini", help="a directory, or emu3-mini")
    parser.add_argument("--vq_model_path", help="the vision tokenizer, where it is not emu3-mini's own")
    parser.add_argument("--count", type=int, default=110, help="prompts of each number of objects")
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="measured beside 1, none")
    parser.add_argument("--top_k", type=int, default=2048, help="likeliest codewords to draw from")
    parser.add_argument("--temperature", type=float, default=0.5, help="what suits this small model")
    parser.add_argument("--seed", type=int, default=100, help="of scenes, captions and sampling")
    main(parser.parse_args())
