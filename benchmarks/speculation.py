# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Speculative Jacobi decoding on a CPU: what windows of guesses gain, and what a larger forward pass costs.

Two parts. `acceptance` counts forward passes of Emu3-Mini on held-out scenes, by window and by the
guess that is made of a token when it comes new into the window; later forward passes refine it. It looks at no clock.
`costs` times forward passes of a model of the released width with 4 layers and the visual rows of the head, by dtype
and rows; it needs a quiet machine. GAINS and COSTS in paddlemix/models/emu3/windows.py are made from the two tables.
"""

import math
import tempfile

import numpy as np
from counts import NEGATIVE_PROMPT, PROMPT
from evaluate import held_out_scenes
from machine import describe
from measure import call, timed
from world import caption

PARTS = ("acceptance", "costs")
DTYPES = ("float32", "bfloat16", "int8", "int4")
WINDOWS = (1, 2, 3, 5, 7, 15)
SETTINGS = ((3.0, 1.0), (3.0, 0.5), (1.5, 1.0), (1.5, 0.5), (3.0, 4.0))  # guidance and temperature
COST_WINDOWS = (0, 1, 2, 3, 5, 7)  # with guidance 2 to 16 rows
WIDE = {
    "model_type": "Emu3", "torch_dtype": "bfloat16", "num_hidden_layers": 4, "vocab_size": 1024 + 32768,
    "pad_token_id": 1017, "bos_token_id": 1018, "eos_token_id": 1019, "img_token_id": 1020, "eol_token_id": 1021,
    "eof_token_id": 1022, "boi_token_id": 1016, "eoi_token_id": 1023,
}  # fmt: skip
SMALL = {"num_hidden_layers": 2, "vocab_size": 1024 + 512}


def add_arguments(parser):
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: both)")
    parser.add_argument("--count", type=int, default=8, help="images of each setting")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=30, help="forward passes of each number of rows, in turns")


def run(args, page):
    if "acceptance" in args.parts:
        given = {"count": 1, "settings": SETTINGS[:1]} if args.small else {"count": args.count, "settings": SETTINGS}
        r = call(args, "ours", "speculation.acceptance", **given)
        verdict = "equal to sequential decoding" if r["equal"] else "**NOT EQUAL**"
        page.put(GAINS_TITLE, GAINS_HEADS, r["rows"], gains_text(r["count"]), {"acceptance": verdict}, names=3)
        page.put(DRAFTS_TITLE, DRAFTS_HEADS, r["drafts"], DRAFTS_TEXT, names=2)
        page.put_machine(["acceptance"], describe(r["versions"]))
        yield "acceptance", r["equal"], r
    if "costs" in args.parts:
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            call(args, "ours", "speculation.write", directory=directory, small=args.small)
            for dtype in args.dtypes:
                given = {"directory": directory, "dtype": dtype, "rounds": 2 if args.small else args.rounds}
                r = call(args, "ours", "speculation.costs", **given)
                page.put(COSTS_TITLE, COSTS_HEADS, [cost_row(dtype, r["seconds"])], COSTS_TEXT)
                page.put_machine([f"pass costs {dtype}"], describe(r["versions"]))
                yield f"costs {dtype}", True, r


# --- acceptance, in a process of its own ------------------------------------------------------------------


def acceptance(side, count, settings):
    """{"rows", "drafts": tables, "equal": every picture has the tokens that sequential decoding gives it}"""
    from guesses import GUESSES

    from paddlemix.models.emu3 import Emu3ForCausalLM
    from paddlemix.processors import Emu3Processor

    processor, model = Emu3Processor.from_pretrained("emu3-mini"), Emu3ForCausalLM.from_pretrained("emu3-mini")
    requests, rows, drafts, equal = make_requests(processor, model.config, count), [], [], True
    for setting in settings:
        expected = [codes for codes, _ in draw(model, requests, *setting)]
        names = [f"{number:g}" for number in setting]
        for guess in GUESSES:
            gains = []
            for window in WINDOWS:
                drawn = draw(model, requests, *setting, guess, window)
                equal &= all(np.array_equal(codes, other) for (codes, _), other in zip(drawn, expected))
                gains.append(sum(codes.size for codes in expected) / sum(passes for _, passes in drawn))
            rows.append([*names, guess, *(f"{gain:.2f}" for gain in gains)])
        drafts.append([*names, *early_exits(model, requests, expected, *setting)])
    return {"rows": rows, "drafts": drafts, "equal": equal, "count": count}


def make_requests(processor, config, count):
    """Arguments of a Drawing for each held-out scene."""
    from paddlemix.processors.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT

    rng, requests = np.random.default_rng(0), []
    for scene in held_out_scenes(count, 100):
        size = {"ratio": f"{scene.width}:{scene.height}", "image_area": config.image_area}
        positive = processor([caption(scene, rng.random() < 0.3, rng) + POSITIVE_PROMPT], **size)
        negative = processor([NEGATIVE_PROMPT], **size)["input_ids"][0]
        requests.append((positive["input_ids"][0], tuple(positive["image_size"][0]), processor.grammar, negative))
    return requests


def make(requests, guidance, temperature, guess="the one in use"):
    from guesses import Guessing

    from paddlemix.models.emu3 import Sampling

    for seed, request in enumerate(requests):
        yield Guessing(*request, guidance, Sampling(temperature=temperature, seed=seed), guess=guess)


def draw(model, requests, guidance, temperature, guess="the one in use", window=None):
    """[(codes, forward passes that drew tokens)]; step by step without a window"""
    from paddlemix.external_ops.few_rows_linear import few_rows
    from paddlemix.models.emu3 import Batch

    drawings, together = list(make(requests, guidance, temperature, guess)), few_rows() // (2 * ((window or 0) + 2))
    for start in range(0, len(drawings), together):  # so many have their whole window
        batch = Batch(model, "jacobi" if window else "step", window)
        batch.join(*drawings[start : start + together])
        while batch:
            batch.step()
    return [(drawing.codes(), drawing.passes) for drawing in drawings]


def early_exits(model, requests, expected, guidance, temperature):
    """[entropy, then shares by the number of layers]: given all tokens before it, how often the model's first layers
    and its head draw the token that all layers draw. No draft made of them can be better."""
    import paddle
    from paddle import nn

    from paddlemix.external_ops.pick_token import guided

    layers, grammar, cells = list(model.model.layers), requests[0][2], []
    visual = slice(grammar.first_visual, grammar.first_visual + grammar.codebook_size)
    for used in range(1, len(layers) + 1):
        model.model.layers, right, entropies = nn.LayerList(layers[:used]), [], []
        for drawing, codes in zip(make(requests, guidance, temperature), expected, strict=True):
            ids, logits = grammar.forced_ids([codes.shape])[0], []
            drawn = np.flatnonzero(ids < 0)
            ids[drawn] = codes.ravel() + grammar.first_visual
            for prompt in drawing.prompts:
                with paddle.no_grad():
                    hidden = model.model(paddle.to_tensor([[*prompt, *ids[:-1].tolist()]]))[0, len(prompt) - 1 :]
                    logits.append(model.lm_head(hidden[paddle.to_tensor(drawn)], visual))
            logits = guided(paddle.stack(logits), drawing.guidance_scale)
            noise = paddle.to_tensor(np.stack([drawing.noise.at(int(i)) for i in drawn]))
            right += (drawing.sampling.pick(logits, noise).numpy() == codes.ravel()).tolist()
            entropies += bits(drawing.sampling, logits)
        cells.append(f"{np.mean(right):.0%}")
    return [f"{np.mean(entropies):.1f} bits", *cells]


def bits(sampling, logits):
    """Entropy of the distributions that tokens are drawn from, a list of floats."""
    logits = np.float64(sampling.top_logits(logits).numpy())
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return (-shares * np.log2(np.where(shares > 0, shares, 1))).sum(-1).tolist()


# --- the cost of rows, in a process of its own -----------------------------------------------------------


def write(side, directory, small):
    from random_checkpoints import LANGUAGE_CONFIG, write_model

    write_model(directory, {**LANGUAGE_CONFIG, **WIDE, **SMALL} if small else {**WIDE})


def costs(side, directory, dtype, rounds):
    """{"seconds": of the quickest forward pass by rows}: passes of all numbers of rows take turns in one process."""
    from paddlemix.models.emu3 import Batch, Drawing, Emu3ForCausalLM, ImageGrammar

    model = Emu3ForCausalLM.from_pretrained(directory, dtype=dtype, progress=False)
    grammar, batches, best = ImageGrammar.from_config(model.config), {}, {}
    for window in COST_WINDOWS:
        prompts = [[*range(1, length), grammar.img] for length in (PROMPT, NEGATIVE_PROMPT)]
        batches[window] = Batch(model, "jacobi" if window else "step", window or None)
        batches[window].join(Drawing(prompts[0], (40, 90), grammar, prompts[1]))
        batches[window].step()  # reads the prompts
    for _ in range(rounds):
        for window, batch in batches.items():
            rows = 2 * (1 + window)
            best[rows] = min(best.get(rows, math.inf), timed(batch.step)[0])
    return {"seconds": best}


# --- the tables ------------------------------------------------------------------------------------------

GAINS_TITLE = "Speculative Jacobi decoding: tokens of an image in a forward pass"
GAINS_HEADS = ["guidance", "temperature", "guess of a new token", *(f"window {window}" for window in WINDOWS)]
DRAFTS_TITLE = "Speculative Jacobi decoding: drafts by the model's first layers"
DRAFTS_HEADS = ["guidance", "temperature", "entropy", *(f"{used} of 6 layers" for used in range(1, 7))]
COSTS_TITLE = "Speculative Jacobi decoding: the time of a forward pass"
COSTS_HEADS = ["", *(f"{2 * (1 + window)} rows" for window in COST_WINDOWS)]


def gains_text(count):
    return f"""\
Emu3-Mini in float32, top_k 2048, {count} held-out scenes of each setting; ends of rows, which take
no forward pass, are not counted. A guess is made of a token when it comes new into the window; later forward passes
replace it by what they draw there with the token's own noise. All images have the tokens of sequential decoding.
"""


DRAFTS_TEXT = """\
How often the first layers, with the last norm and the head, draw the token that all layers draw, given all tokens
before it and its own noise: above this no draft by them comes. The entropy is that of what all layers draw from. A
trained smaller model was not measured: there is none.
"""
COSTS_TEXT = """\
The released width (hidden 4096, intermediate 14336, 8 key heads, the 32,768 visual rows of the head) with 4 layers,
random weights; an image with guidance, sampling and noise included. The quickest of forward passes that take turns in
one process, and how many times that of 2 rows it takes.
"""


def cost_row(dtype, seconds):
    least = next(iter(seconds.values()))
    return [dtype, *(f"{s * 1e3:.0f} ms, {s / least:.2f}" for s in seconds.values())]
