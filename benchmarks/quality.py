# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What int8, int4 and bfloat16 cost in quality: Emu3-Mini with them beside itself in float32, on held-out scenes.

The next visual token of real scenes, given all tokens before it: how often the likeliest one is the same, and the
Kullback-Leibler divergence of the distribution from float32's. Then the scores of tools/mini/evaluate.py: answers that
are right word for word, and drawings that show what their prompts say. The table goes into benchmarks/RESULTS.md.
"""

import argparse
import math
import sys
import warnings
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tools/mini")]

from evaluate import NUMBERS, held_out_scenes, measure_answers, measure_drawings, percent
from PIL import Image
from report import put_section
from tqdm import tqdm
from world import caption, render

TITLE = "Quality of quantized weights: Emu3-Mini"
DTYPES = ("float32", "bfloat16", "int8", "int4")
SAMPLING = {"top_k": 2048, "temperature": 0.5}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="emu3-mini", help="a directory, or emu3-mini")
    parser.add_argument("--vq_model_path", help="the vision tokenizer, where it is not emu3-mini's own")
    parser.add_argument("--count", type=int, default=110, help="prompts of each number of objects; three times as many "
                        "scenes and questions")  # fmt: skip
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=100, help="of scenes, captions and sampling")
    parser.add_argument("--report", type=Path, default=HERE / "RESULTS.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Paddle's notices when it is imported
    import paddle

    from paddlemix.machine import available_cores
    from paddlemix.models.emu3 import Emu3ForCausalLM
    from paddlemix.processors import Emu3Processor

    paddle.set_device("cpu")
    paddle.base.core.set_num_threads(available_cores())
    processor = Emu3Processor.from_pretrained(args.model_path, args.vq_model_path)
    sequences = real_scenes(processor, held_out_scenes(3 * args.count, args.seed), args.seed)
    rows, reference = [], None
    for dtype in DTYPES:
        model = Emu3ForCausalLM.from_pretrained(args.model_path, dtype=dtype)
        found = next_tokens(model, processor.grammar, sequences)
        reference = found if reference is None else reference
        rows.append([dtype, size_of(model), *compare(found, reference), *scores(model, processor, args)])
        print(*rows[-1], sep="  ", flush=True)
    put_section(args.report, TITLE, section(rows, args, len(reference[0])))
    print(f"wrote {args.report}")


def real_scenes(processor, scenes, seed):
    """[(ids of a prompt and the picture that it tells of, how many of them are the prompt)]"""
    rng, sequences = np.random.default_rng(seed), []
    for scene in tqdm(scenes, desc="coding", leave=False):
        codes = processor.tokenize_image([Image.fromarray(render(scene))])[0]
        prompt = processor(
            caption(scene, rng.random() < 0.3, rng),
            ratio=f"{scene.width}:{scene.height}",
            image_area=8 * 8 * codes.size,
        )["input_ids"][0]
        head = len(processor.grammar.head(*codes.shape))
        sequences.append((prompt + processor.grammar.encode(codes)[head:], len(prompt)))
    return sequences


def next_tokens(model, grammar, sequences):
    """At every visual token: the likeliest one, int64 [tokens], and the logarithms of all their probabilities,
    float64 [tokens, codebook]."""
    import paddle

    logs, visual = [], slice(grammar.first_visual, grammar.first_visual + grammar.codebook_size)
    for ids, start in tqdm(sequences, desc=f"reading, {model.weight_dtype}", leave=False):
        with paddle.no_grad():
            hidden = model.model(paddle.to_tensor([ids[:-1]]))[0, start - 1 :]
            logits = model.lm_head(hidden, visual).numpy().astype(np.float64)
        is_visual = (np.array(ids[start:]) >= visual.start) & (np.array(ids[start:]) < visual.stop)
        logits = logits[is_visual] - logits[is_visual].max(-1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    logs = np.concatenate(logs)
    return logs.argmax(-1), logs


def compare(found, reference):
    """How often the likeliest token is the reference's, and the mean divergence from it in nats."""
    divergence = (np.exp(reference[1]) * (reference[1] - found[1])).sum(-1).mean()
    return f"{100 * (found[0] == reference[0]).mean():.1f} %", f"{divergence:.5f}"


def scores(model, processor, args):
    """Shares of answers and of drawings of one, two and three objects that are right."""
    right = measure_answers(model, processor, held_out_scenes(3 * args.count, args.seed), args.seed)
    cells = [percent(sum(right.values(), []))]
    for things in NUMBERS:
        scenes = held_out_scenes(args.count, args.seed + things, things)
        drawn = measure_drawings(model, processor, scenes, args.guidance_scale, SAMPLING, args.seed)
        cells.append(percent([r["right"] for r in drawn]))
    return cells


def size_of(model):
    size = sum(t.element_size() * math.prod(t.shape) for t in model.state_dict().values())
    return f"{size / 1e6:.1f} MB"


def section(rows, args, tokens):
    heads = ["", "in memory", "same token", "divergence, nats", "answers"] + [f"drawn, {n}" for n in NUMBERS.values()]
    text = "".join(f"| {' | '.join(row)} |\n" for row in [heads, ["---"] * len(heads), *rows])
    text += f"""
`benchmarks/quality.py --count {args.count}`: {args.model_path} on held-out scenes. Same token: at {tokens} visual
tokens of real scenes, all tokens before being given, the likeliest one is float32's; divergence: Kullback-Leibler, of
the next visual token's distribution from float32's. Answers ({3 * args.count}) and drawings ({args.count} of each,
guidance {args.guidance_scale:g}, temperature {SAMPLING["temperature"]:g}) that are right by the rules of
`tools/mini/evaluate.py`.
"""
    return text


if __name__ == "__main__":
    main()
