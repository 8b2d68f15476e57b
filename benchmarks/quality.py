# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Quality of bfloat16, int8 and int4 weights: Emu3-Mini with them beside itself in float32, on held-out scenes.

The next visual token of real scenes, given all tokens before it: how often the likeliest one is the same, and the
Kullback-Leibler divergence of the distribution from float32's. Then the scores of tools/mini/evaluate.py: answers that
are right word for word, and images that show what their prompts say.
"""

import math
import os
from pathlib import Path

import numpy as np
import text_model
from evaluate import NUMBERS, held_out_scenes, measure_answers, measure_drawings, percent
from machine import describe
from measure import ROOT, call
from PIL import Image
from tqdm import tqdm
from world import caption, render

TITLE = "Quality of quantized weights: Emu3-Mini"
DTYPES = ("float32", "bfloat16", "int8", "int4")
SAMPLING = {"top_k": 2048, "temperature": 0.5}


def add_arguments(parser):
    parser.add_argument("--model_path", default="emu3-mini", help="a directory, or emu3-mini")
    parser.add_argument("--vq_model_path", help="the vision tokenizer, where it is not emu3-mini's own")
    parser.add_argument("--count", type=int, default=110, help="prompts of each number of objects; three times as many "
                        "scenes and questions")  # fmt: skip
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=100, help="of scenes, captions and sampling")
    parser.add_argument("--text_model", type=Path, metavar="FILE.gguf", help="measure this model instead")
    python = Path(os.environ.get("LLAMA_PYTHON") or ROOT / ".venv-llama/bin/python")
    parser.add_argument("--llama_python", type=Path, default=python, help="for it, a Python with llama.cpp and gguf")


def run(args, page):
    if args.text_model:
        yield from text_model.run(args, page)
        return
    names = ("model_path", "vq_model_path", "count", "guidance_scale", "seed")
    given = {name: getattr(args, name) for name in names} | ({"count": 1} if args.small else {})
    r = call(args, "ours", "quality.measure", **given)
    page.put(TITLE, HEADS, r["rows"], text(r["tokens"], **given))
    page.put_machine(["quality"], describe(r["versions"]))
    yield "quality", True, r


def measure(side, model_path, vq_model_path, count, guidance_scale, seed):
    """{"rows": the table's, "tokens": how many were compared}"""
    from paddlemix.models.emu3 import Emu3ForCausalLM
    from paddlemix.processors import Emu3Processor

    processor = Emu3Processor.from_pretrained(model_path, vq_model_path)
    sequences = real_scenes(processor, held_out_scenes(3 * count, seed), seed)
    rows, reference = [], None
    for dtype in DTYPES:
        model = Emu3ForCausalLM.from_pretrained(model_path, dtype=dtype)
        found = next_tokens(model, processor.grammar, sequences)
        reference = found if reference is None else reference
        shares = scores(model, processor, count, guidance_scale, seed)
        rows.append([dtype, size_of(model), *compare(found, reference), *shares])
    return {"rows": rows, "tokens": len(reference[0])}


def real_scenes(processor, scenes, seed):
    """[(ids of a prompt and its image, how many of them are the prompt)]"""
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


def scores(model, processor, count, guidance_scale, seed):
    """Shares of answers and of images of one, two and three objects that are right."""
    right = measure_answers(model, processor, held_out_scenes(3 * count, seed), seed)
    cells = [percent(sum(right.values(), []))]
    for things in NUMBERS:
        scenes = held_out_scenes(count, seed + things, things)
        drawn = measure_drawings(model, processor, scenes, guidance_scale, SAMPLING, seed)
        cells.append(percent([r["right"] for r in drawn]))
    return cells


def size_of(model):
    size = sum(t.element_size() * math.prod(t.shape) for t in model.state_dict().values())
    return f"{size / 1e6:.1f} MB"


HEADS = ["", "in memory", "same token", "divergence, nats", "answers", *(f"images, {n}" for n in NUMBERS.values())]


def text(tokens, model_path, vq_model_path, count, guidance_scale, seed):
    return f"""\
`quality --count {count}`: {model_path} on held-out scenes. Same token: at {tokens} visual tokens of real scenes, all
tokens before being given, the likeliest one is float32's; divergence: Kullback-Leibler, of the next visual token's
distribution from float32's. Answers ({3 * count}) and images ({count} of each, guidance {guidance_scale:g}, temperature
{SAMPLING["temperature"]:g}) that are right by the rules of `tools/mini/evaluate.py`.
"""
