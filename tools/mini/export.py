# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Write the trained models in the released layout, float16, and the golden tokens that PyTorch gives with them.

The golden tokens are computed from the written files, so `--only_golden` repeats them without the training's.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import need
from draw_demo_scene import TARGET as SCENE
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_vision import VisionTokenizer
from train_vision import to_tensor
from transformers import Emu3ForCausalLM, Emu3TextConfig
from vocabulary import CHAT, NEGATIVE_PROMPT, ROOT, Emu3Tokenizer

from paddlemix.models.emu3.image_grammar import ImageGrammar
from paddlemix.processors import Emu3VisionVQImageProcessor

TARGET = ROOT / "paddlemix" / "demo_models" / "emu3_mini"
GOLDEN = ROOT / "tests" / "golden" / "emu3_mini.json"
DRAWING = {"guidance_scale": 1.5, "temperature": 0.5}  # what draws best, for generation_config.json
DRAWINGS = (  # prompts and sizes in codes
    ("a large red circle on a white background.", (8, 8)), ("a blue square left of a green triangle.", (7, 9)),
    ("a small purple cross above an orange diamond on a black background", (9, 7)), ("一个黄色圆环。", (8, 8)),
    ("", (8, 8)),
)  # fmt: skip
CLEAR = 1e-3  # logits; where the best two are nearer, two frameworks may round to different tokens
KEPT = (  # of transformers' configuration
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
QUESTIONS = (
    "Please describe the image", "How many objects are there?", "What colour is the triangle?", "请描述这张图片",
)  # fmt: skip


def in_float16(state):
    return {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}


def write_vision(state, directory):
    directory.mkdir(parents=True, exist_ok=True)
    config = {**VisionTokenizer().config, "torch_dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(in_float16(state), directory / "model.safetensors", {"format": "pt"})
    # 4:3 pictures of the least area go through unchanged; photographs keep 256 x 256 pixels, but not in a question
    sizes = {"min_pixels": 56 * 72, "max_pixels": 256 * 256, "question_max_pixels": 64 * 64}
    Emu3VisionVQImageProcessor(**sizes).save_pretrained(directory)


def write_language(checkpoint, vocabulary, directory):
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt", "tokenizer_config.json"):
        shutil.copyfile(Path(vocabulary) / name, directory / name)
    tokenizer, trained = Emu3Tokenizer.from_pretrained(directory), checkpoint["config"]
    config = {name: trained[name] for name in KEPT}
    roles = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")
    config.update({f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in roles})
    config.update(
        architectures=["Emu3ForCausalLM"], model_type="Emu3", torch_dtype="float16", hidden_act="silu",
        rope_theta=trained["rope_parameters"]["rope_theta"], rope_scaling=None, attention_dropout=0.0,
        tie_word_embeddings=False, image_area=64 * 64, initializer_range=0.02, use_cache=True,
    )  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(DRAWING, indent=2) + "\n")
    save_file(in_float16(checkpoint["model"]), directory / "model.safetensors", {"format": "pt"})


def written(directory):
    """config.json's values and the weights in float32."""
    weights = load_file(directory / "model.safetensors")
    weights = {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}
    return json.loads((directory / "config.json").read_text()), weights


@torch.no_grad()
def golden(target):
    """What PyTorch gives with the written weights, computed in float32."""
    config, weights = written(target / "vision_tokenizer")
    vision = VisionTokenizer(config).eval()
    vision.load_state_dict(weights)
    config, weights = written(target / "language_model")
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    same = {name: config[name] for name in (*KEPT, "pad_token_id", "bos_token_id", "eos_token_id")}
    model = Emu3ForCausalLM(Emu3TextConfig(**same, rope_parameters=rope)).eval()
    model.load_state_dict(weights)
    tokenizer = Emu3Tokenizer.from_pretrained(target / "language_model")
    grammar = ImageGrammar.from_tokenizer(tokenizer, vision.config["codebook_size"])

    codes = vision.encode(to_tensor([Image.open(SCENE)]))[0].numpy()
    drawings = [greedy_picture(model, tokenizer, grammar, *d, scale) for d in DRAWINGS for scale in (1.0, 3.0)]
    answers = []
    for question in QUESTIONS:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(CHAT[0]), *grammar.encode(codes)]
        ids += tokenizer.encode(question + CHAT[1], allow_special=False)
        new = []
        while len(new) < 32 and new[-1:] != [tokenizer.eos_token_id]:
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        answers.append({"question": question, "ids": new})
    clear = [d for d in drawings if d["least_margin"] >= CLEAR]
    return {"codes": codes.tolist(), "drawings": clear, "answers": answers}


def greedy_picture(model, tokenizer, grammar, prompt, size, scale):
    """The likeliest visual token at each place, with classifier-free guidance, and how clearly it won."""
    texts = [prompt, NEGATIVE_PROMPT] if scale != 1 else [prompt]
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(t, allow_special=False), *grammar.head(*size)] for t in texts]
    picked, margin = [], float("inf")
    for position in range(size[0] * (size[1] + 1) - 1):
        token = grammar.forced(*size, position)
        if token is None:
            logits = torch.stack([model(input_ids=torch.tensor([row + picked])).logits[0, -1] for row in rows])
            logits = logits[:, grammar.first_visual : grammar.first_visual + grammar.codebook_size]
            logits = logits[0] if scale == 1 else logits[1] + scale * (logits[0] - logits[1])
            best = logits.topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            token = int(best.indices[0]) + grammar.first_visual
        picked.append(token)
    codes = grammar.decode(picked).tolist()
    return {"prompt": prompt, "guidance_scale": scale, "codes": codes, "least_margin": round(margin, 5)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="mini_run", help="where the training's checkpoints are")
    parser.add_argument("--vision", help="the vision tokenizer's checkpoint (default: the one in --out)")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--golden", type=Path, default=GOLDEN)
    parser.add_argument("--only_golden", action="store_true", help="of the files that are in --target already")
    args = parser.parse_args()
    if not args.only_golden:
        write_vision(need(args.vision or f"{args.out}/polished.pt")["model"], args.target / "vision_tokenizer")
        write_language(need(f"{args.out}/language.pt"), f"{args.out}/vocabulary", args.target / "language_model")
    args.golden.write_text(json.dumps(golden(args.target)) + "\n")
    print(f"wrote {args.target} and {args.golden}")
