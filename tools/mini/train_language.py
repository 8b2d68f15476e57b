# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Train the language model to draw scenes from captions and to answer questions about them.

The model is the Emu3 language model of transformers; hidden matrices are trained with Muon, the rest with AdamW.
Scenes are drawn and turned into codes once, then kept. `--out` holds that and the checkpoints; a run that was
cut short goes on from the last.

A code tells mostly of its place, and a little of the whole picture, too little to be seen: a fifth of the codes differ
between scenes whose places look alike. To draw, the model is taught the commonest code of each kind of place alone;
pictures made of those read as well. To answer, it sees the codes as they are, and a linear map of its middle layer's
states, dropped afterwards, must name the shape at each code: answers alone never make it look an object up by shape.
"""

import argparse
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from common import descend, encoder_of, learning_rate, load, need, resume, save, save_training
from torch_vision import VisionTokenizer
from tqdm import tqdm
from train_vision import autocast, to_tensor
from transformers import Emu3ForCausalLM, Emu3TextConfig
from vocabulary import write
from world import CANVASES, SHAPES, caption, places, questions, random_scene, render

from paddlemix.models.emu3.image_grammar import ImageGrammar
from paddlemix.processors.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT, Prompts
from paddlemix.training.datasets import IGNORED, Example, Row, collate, make_row

POSITIONS = 1024
SHARES = (0.25, 0.5, 0.25)  # of a batch, scenes of one, two and three objects: more are harder
KINDS = {"colour": 4, "shape": 3, "relation": 3, "describe": 2, "count": 1, "background": 1}  # of questions: how often
TURNS = 4  # questions about one scene: an answer is a token or two, the scene hundreds


def text_config(tokenizer, args):
    return Emu3TextConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 64, max_position_embeddings=POSITIONS, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attention_dropout=0.0, mlp_bias=False,
        attention_bias=False, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.02,
    )  # fmt: skip


@torch.no_grad()
def coded_scenes(vision, count, seed, held=False):
    """Scenes that are held out or not, with their codes: a list of (Scene, int64 [h, w])."""
    rng, pairs = np.random.default_rng(seed), []
    for canvas, share in zip(CANVASES, (0.7, 0.15, 0.15)):
        scenes = [random_scene(rng, canvas=canvas, held=held) for _ in range(int(count * share))]
        for start in tqdm(range(0, len(scenes), 64), desc=f"codes of {canvas[1]} x {canvas[0]} scenes", mininterval=10):
            part = scenes[start : start + 64]
            codes = vision.encode(to_tensor([render(s) for s in part])).numpy()
            pairs += zip(part, codes)
    return pairs


def settled(pairs, more):
    """(Scene, codes, the commonest codes of its places) for each pair of both lists, `by_number`; the first counts."""
    counts = defaultdict(Counter)
    for scene, codes in tqdm(pairs, desc="commonest codes", mininterval=10):
        for place, code in zip(places(scene, codes.shape), codes.ravel().tolist()):
            counts[place][code] += 1
    commonest = {place: count.most_common(1)[0][0] for place, count in counts.items()}

    def settle(scene, codes):
        found = [commonest.get(place, code) for place, code in zip(places(scene, codes.shape), codes.ravel().tolist())]
        return scene, codes, np.array(found).reshape(codes.shape)

    return [by_number([settle(*pair) for pair in some]) for some in (pairs, more)]


def by_number(scenes):
    """Those of one, of two and of three objects."""
    return [[s for s in scenes if len(s[0].things) == number] for number in (1, 2, 3)]


def drawing_row(rng, scene, codes, prompts):
    """A Row of a drawing. One in ten has no caption: nothing, or what guidance leads away from."""
    text = caption(scene, rng.random() < 0.35, rng)
    chance = rng.random()
    if chance < 0.1:
        text = NEGATIVE_PROMPT if chance < 0.05 else ""
    elif chance < 0.85:
        text += POSITIVE_PROMPT
    return Row("", *make_row(prompts, Example("", text, codes, ())))


def shapes_seen(scene, shape):
    """The shape at each code of a scene: its number in SHAPES, or len(SHAPES) where there is none; a flat list."""
    height, width = shape
    centres = [(8 * column + 4, 8 * row + 4) for row in range(height) for column in range(width)]
    return [
        next((SHAPES.index(t.shape) for t in scene.things if max(abs(t.x - x), abs(t.y - y)) <= 12), len(SHAPES))
        for x, y in centres
    ]


def answering_row(rng, scene, codes, prompts):
    """A Row of up to TURNS questions and their answers; a description, which tells the rest, stands alone."""
    asked, turns = questions(scene, rng.random() < 0.35), []
    while len(turns) < TURNS:
        kinds = sorted({kind for kind, _, _ in asked})
        weights = np.array([KINDS[kind] for kind in kinds])
        kind = rng.choice(kinds, p=weights / weights.sum())
        some = [turn for k, *turn in asked if k == kind]
        turns.append(some[rng.integers(len(some))])
        asked = [a for a in asked if a[0] != "describe" and a[1] != turns[-1][0]]
        if kind == "describe":
            break
    return Row("", *make_row(prompts, Example("", "", codes, tuple(turns))))


def batch(rng, scenes, prompts, drawings, answers):
    """Ids and labels, int64 [drawings + answers, length], padded on the right, and the shapes at the answers' codes.

    scenes: of one, two, three objects.
    """
    rows, seen = [], []
    for i in range(drawings + answers):
        some = scenes[rng.choice(3, p=SHARES)]
        scene, codes, settled_codes = some[rng.integers(len(some))]
        if i < drawings:
            rows.append(drawing_row(rng, scene, settled_codes, prompts))
        else:
            rows.append(answering_row(rng, scene, codes, prompts))
            seen += shapes_seen(scene, codes.shape)
    ids, labels = map(torch.from_numpy, collate(rows, prompts.grammar.pad))
    return ids, labels, torch.tensor(seen)


def losses(model, probe, grammar, ids, labels, seen, drawings):
    """Mean cross entropy of the drawings' visual tokens, the answers' tokens, and the shapes at the answers' codes."""
    labels, parts = labels[:, 1:], []
    with autocast():
        output = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        hidden = output.last_hidden_state[:, :-1]
        for rows in (slice(None, drawings), slice(drawings, None)):
            counts = labels[rows] != IGNORED
            parts.append(F.cross_entropy(model.lm_head(hidden[rows][counts]).float(), labels[rows][counts]))
        visual = (ids >= grammar.first_visual) & (ids < grammar.first_visual + grammar.codebook_size)
        middle = output.hidden_states[len(model.model.layers) // 2][drawings:][visual[drawings:]]
        parts.append(F.cross_entropy(probe(middle).float(), seen))
    return parts


def make_optimizers(model, probe):
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    muon = torch.optim.Muon(hidden, lr=0.0, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = [torch.optim.AdamW(some, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0) for some in (rest, probe.parameters())]
    return [muon, *adam]


def prepare(args):
    """(Prompts, scenes to train on, held-out ones, what they are of), the scenes as `settled` gives them"""
    vision, trained = VisionTokenizer().eval(), need(args.vision or f"{args.out}/vision.pt")["model"]
    vision.load_state_dict(trained)
    of = {"encoder": encoder_of(trained), "scenes": args.scenes, "seed": args.seed}
    tokenizer = write(f"{args.out}/vocabulary", vision.config["codebook_size"], POSITIONS)
    grammar = ImageGrammar.from_tokenizer(tokenizer, vision.config["codebook_size"])
    cache = load(f"{args.out}/codes.pt")
    if not cache or cache["of"] != of:
        cache = {
            "of": of,
            "train": coded_scenes(vision, args.scenes, args.seed),
            "held": coded_scenes(vision, 200, 1, held=True),
        }
        save(f"{args.out}/codes.pt", **cache)
    return Prompts(tokenizer, grammar), *settled(cache["train"], cache["held"]), of


def train(args):
    torch.manual_seed(args.seed)
    prompts, scenes, held, of = prepare(args)
    of.update(hidden=args.hidden, layers=args.layers)
    model = Emu3ForCausalLM(text_config(prompts.tokenizer, args))
    probe = torch.nn.Sequential(torch.nn.RMSNorm(args.hidden), torch.nn.Linear(args.hidden, len(SHAPES) + 1))
    optimizers = make_optimizers(model, probe)
    state = resume(f"{args.out}/language.pt", of, model, optimizers)
    first = state["step"]
    if "probe" in state:
        probe.load_state_dict(state["probe"])
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {sum(map(len, scenes))} scenes")
    test = batch(np.random.default_rng(2), held, prompts, 32, 32)
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=5)
    for step in bar:
        rng = np.random.default_rng([args.seed, step])
        rows = batch(rng, scenes, prompts, args.drawings, args.answers)
        drawing, answering, shapes = losses(model, probe, prompts.grammar, *rows, args.drawings)
        rate = learning_rate(step, args.steps, args.lr, warmup=100)
        descend(optimizers, model.parameters(), drawing + answering + shapes, rate)
        if step % 100 == 99 or step == args.steps - 1:
            with torch.no_grad():
                new = losses(model, probe, prompts.grammar, *test, 32)
            bar.write(
                f"step {step + 1}: drawing {float(drawing):.3f}, answering {float(answering):.3f}, shapes "
                f"{float(shapes):.3f}; held out {float(new[0]):.3f}, {float(new[1]):.3f}, {float(new[2]):.3f}"
            )
            save_training(
                f"{args.out}/language.pt", step + 1, of, model, optimizers,
                config=model.config.to_dict(), probe=probe.state_dict(),
            )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="mini_run", help="checkpoints and codes")
    parser.add_argument("--vision", help="the vision tokenizer's checkpoint (default: the one in --out)")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--scenes", type=int, default=40000, help="to train on")
    parser.add_argument("--drawings", type=int, default=32, help="a batch")
    parser.add_argument("--answers", type=int, default=24, help="a batch")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
