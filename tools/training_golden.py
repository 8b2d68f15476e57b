# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Write tests/golden/training.npz and .json: what PyTorch's Emu3 learns from a few rows, number for number.

Run it in the environment of benchmarks/peer/requirements.txt, which has PyTorch and transformers:

    .venv-peer/bin/python tools/training_golden.py

Nothing of this project's training stands behind the numbers. The rows, their labels and the tokenizer are written out
below, the model is transformers' with Emu3-Mini's weights, the optimizer and the clipping are PyTorch's, and the
learning rates transformers'. All of it is done in float32 and again in float64: how far the two are apart is what
rounding explains ("float32_from_float64" in the JSON).

training.json:
    rows: what each row is made of: "text", "codes", "with_eos" of a drawing; "codes", "question", "answer".
    settings, runs, versions: of the optimizer, of each run, of the libraries.
    parameters: names, in the order of the arrays' axis P.
    micro_batches: which rows each of the two micro-batches of a step takes; every step takes all rows.
training.npz (K elements of each parameter):
    ids, labels: int32 [rows, longest], padded on the right with the padding token and -100.
    elements: int32 [P, K], where in a flattened parameter the elements below stand: three quarters of them where the
        gradient is large, the others anywhere.
and with PRECISION float32 and float64, all of them float64:
    PRECISION.loss: the mean of the cross entropy over all labels of all rows.
    PRECISION.gradient_norm, [] and PRECISION.gradient_norms [P], PRECISION.gradient [P, K]: of that loss.
    PRECISION.RUN.losses, .rates, .gradient_norms: [steps], the loss before each step, and the norm before clipping.
    PRECISION.RUN.norms [P], PRECISION.RUN.values [P, K]: of the parameters after "steps_kept" steps.
"""

import base64
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peer.theirs import language_model

MODEL = ROOT / "paddlemix" / "demo_models" / "emu3_mini" / "language_model"
GOLDEN = ROOT / "tests" / "golden" / "training"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
IGNORED, ELEMENTS, TEMPERATURE = -100, 16, 1.3
SETTINGS = {
    "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 1, "max_steps": 4, "weight_decay": 0.1,
    "not_decayed": ["norms", "biases"], "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-6, "steps_kept": 3,
}  # fmt: skip
RUNS = {"unclipped": {"max_grad_norm": 5.0}, "clipped": {"max_grad_norm": 0.5}}
MICRO_BATCHES = [[0, 3, 4], [1, 2, 5]]  # of unequal numbers of labels

# The ids of Emu3-Mini: 709 ordinary tokens and 208 for text, of which the last two are BOS and EOS, come first.
PAD, EOL, EOF, BOS, EOS, IMG, BOI, EOI, FIRST_VISUAL, LAST_VISUAL = 709, 912, 913, 915, 916, 917, 918, 919, 920, 13207
TEMPLATE = "You are a helpful assistant. USER: ", ". ASSISTANT:"  # around a picture and a question
PIECE = re.compile(r" ?[^\W\d_]+|\d| ?[^\s\w]+|\s+")  # enough for texts without line ends and apostrophes


# --- rows -----------------------------------------------------------------------------------------------


def read_ranks():
    lines = (MODEL / "emu3.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def encode(text, ranks):
    """Byte-level BPE: in each piece the neighbours that make the token of the lowest rank become one, until none do."""
    ids = []
    for piece in PIECE.findall(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def head(height, width, ranks):
    return [BOI, *encode(f"{height}*{width}", ranks), IMG]


def picture(codes, ranks):
    body = [[FIRST_VISUAL + code for code in row] + [EOL] for row in codes]
    return [*head(len(codes), len(codes[0]), ranks), *sum(body, []), EOF, EOI]


def drawing(text, codes, with_eos, ranks):
    """Loss on the visual tokens, and on EOS where there is one."""
    ids = [BOS, *encode(text, ranks), *picture(codes, ranks)] + [EOS] * with_eos
    return ids, [i if FIRST_VISUAL <= i <= LAST_VISUAL or i == EOS else IGNORED for i in ids]


def answering(codes, question, answer, ranks):
    """Loss on the answer and on EOS."""
    before, after = TEMPLATE
    prompt = [BOS, *encode(before, ranks), *picture(codes, ranks), *encode(question + after, ranks)]
    answer = [*encode(answer, ranks), EOS]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def draw(model, text, height, width, ranks, rng):
    """Codes that the model takes for likely: others would have gradients that are always clipped."""
    ids, codes = [BOS, *encode(text, ranks), *head(height, width, ranks)], []
    for _ in range(height):
        codes.append([])
        for _ in range(width):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1, FIRST_VISUAL : LAST_VISUAL + 1].double().numpy()
            codes[-1].append(int(np.argmax(logits + TEMPERATURE * rng.gumbel(size=logits.shape))))
            ids.append(FIRST_VISUAL + codes[-1][-1])
        ids.append(EOL)
    return codes


def make_rows(model):
    """What the rows are made of, and (ids, labels) of each."""
    ranks, rng = read_ranks(), np.random.RandomState(20)
    made = [
        {"text": "a small red circle on white", "codes": (7, 9), "with_eos": False},
        {"text": "", "codes": (4, 3), "with_eos": False},
        {"text": "一个蓝色的方形", "codes": (7, 4), "with_eos": True},
        {"codes": (8, 8), "question": "What colour is the ring?", "answer": "green"},
        {"codes": (3, 5), "question": "这是什么?", "answer": "two crosses on grey."},
        {"text": "a yellow cross, 2 green rings!", "codes": (9, 7), "with_eos": False},
    ]
    for row in made:
        row["codes"] = draw(model, row.get("text", "a green ring on black"), *row["codes"], ranks, rng)
    return made, [(drawing if "text" in row else answering)(**row, ranks=ranks) for row in made]


def padded(rows):
    """int64 [rows, longest] of ids and of labels."""
    longest = max(len(ids) for ids, _ in rows)
    ids = [ids + [PAD] * (longest - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


# --- training -------------------------------------------------------------------------------------------


def load(dtype):
    model = language_model(MODEL, "float32").to(dtype)
    if dtype == torch.float64:  # transformers' norms are float32 whatever they are given
        for module in model.modules():
            if type(module).__name__ == "Emu3RMSNorm":
                module.forward = lambda x, norm=module: (
                    norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
                )
    return model


def sum_of_losses(model, ids, labels):
    """Of the logits at each position the cross entropy of the next position's label."""
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def descend(model, batches):
    """Leave the gradient of the mean over all labels of all batches, and return that mean."""
    count, total = sum(int((labels != IGNORED).sum()) for _, labels in batches), 0.0
    for ids, labels in batches:
        loss = sum_of_losses(model, ids, labels) / count
        loss.backward()
        total += loss.item()
    return total


def chosen_elements(gradients, rng):
    """int32 [P, ELEMENTS]: positions in each flattened gradient; the first three quarters are not small."""
    chosen = []
    for gradient in gradients:
        size = gradient.abs().flatten().numpy()
        large = np.flatnonzero(size > np.median(size[size > 0]))
        some = rng.choice(large, ELEMENTS * 3 // 4, replace=False)
        chosen.append([*some, *rng.choice(len(size), ELEMENTS - len(some), replace=False)])
    return np.array(chosen, np.int32)


def norms(tensors):
    return np.array([t.double().norm().item() for t in tensors])


def values(tensors, elements):
    return np.stack([t.detach().double().flatten().numpy()[i] for t, i in zip(tensors, elements)])


def train(dtype, ids, labels, elements, max_grad_norm):
    """The losses, rates and gradient norms of all steps, and the parameters after the first few."""
    model, s = load(dtype), SETTINGS
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in parameters.items() if ("norm" in name) == is_norm], "weight_decay": decay}
        for is_norm, decay in ((False, s["weight_decay"]), (True, 0.0))  # there are no biases
    ]
    optimizer = torch.optim.AdamW(groups, s["learning_rate"], (s["beta1"], s["beta2"]), s["epsilon"])
    schedule = transformers.get_scheduler(
        "cosine_with_min_lr", optimizer, s["warmup_steps"], s["max_steps"], {"min_lr": s["min_learning_rate"]}
    )
    result = {"losses": [], "rates": [], "gradient_norms": []}
    for step in range(s["max_steps"]):
        if step == s["steps_kept"]:
            result["norms"] = norms(parameters.values())
            result["values"] = values(parameters.values(), elements)
        result["losses"].append(descend(model, [(ids[rows], labels[rows]) for rows in MICRO_BATCHES]))
        result["gradient_norms"].append(torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm).item())
        result["rates"].append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return result


def apart(data, name):
    """The largest difference of float32 from float64, over the largest value: of its parameter where there is one."""
    one, two = (np.asarray(data[f"{precision}.{name}"]) for precision in DTYPES)
    size = np.abs(two).max(axis=-1, keepdims=True) if two.ndim == 2 else np.abs(two)
    return float((np.abs(one - two) / np.maximum(size, 1e-30)).max())


def main():
    torch.set_num_threads(2)
    model = load(torch.float32)
    assert model.config.rope_parameters["rope_theta"] == 10000 and model.config.vocab_size == LAST_VISUAL + 1
    made, rows = make_rows(model)
    ids, labels = padded(rows)
    parameters, data = dict(model.named_parameters()), {}
    for precision, dtype in DTYPES.items():
        model = load(dtype)
        data[f"{precision}.loss"] = descend(model, [(ids, labels)])
        gradients = [p.grad for p in model.parameters()]
        if precision == "float32":
            assert abs(model(ids, labels=labels).loss.item() - data["float32.loss"]) < 1e-5  # transformers' own
            elements = chosen_elements(gradients, np.random.RandomState(6))
        data[f"{precision}.gradient_norms"] = norms(gradients)
        data[f"{precision}.gradient_norm"] = np.linalg.norm(data[f"{precision}.gradient_norms"])
        data[f"{precision}.gradient"] = values(gradients, elements)
        for run, options in RUNS.items():
            result = train(dtype, ids, labels, elements, **options)
            assert all((norm > options["max_grad_norm"]) == (run == "clipped") for norm in result["gradient_norms"])
            data.update({f"{precision}.{run}.{name}": value for name, value in result.items()})
    names = [name.removeprefix("float64.") for name in data if name.startswith("float64.")]
    about = {
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, np)},
        "settings": SETTINGS, "runs": RUNS, "micro_batches": MICRO_BATCHES, "parameters": list(parameters),
        "float32_from_float64": {name: float(f"{apart(data, name):.1e}") for name in names},
        "rows": made,
    }  # fmt: skip
    data.update(ids=ids.numpy().astype(np.int32), labels=labels.numpy().astype(np.int32), elements=elements)
    np.savez_compressed(GOLDEN.with_suffix(".npz"), **data)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in about.items())
    GOLDEN.with_suffix(".json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    print(json.dumps(about["float32_from_float64"], indent=1))


if __name__ == "__main__":
    main()
