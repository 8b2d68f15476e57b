# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A small byte-level vocabulary in the released files' format, made from the words of world.py.

Byte-pair merges (Sennrich et al., arXiv 1508.07909) are learnt inside words, Chinese ones cut by hand, so that
every word of the world is one token and any other text still is bytes.
"""

import base64
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import regex
from world import CHINESE, caption, questions, random_scene

from paddlemix.models.emu3.tokenization_emu3 import PIECES, Emu3Tokenizer
from paddlemix.processors.prompts import CHAT_TEMPLATE, NEGATIVE_PROMPT, POSITIVE_PROMPT

CHAT = CHAT_TEMPLATE.split("{image_prompt}{text_prompt}")  # before and after a question
CHINESE_WORDS = (
    "请描述这张图片", "图片里有什么", "有几个物体", "物体", "背景", "背景是什么颜色", "是什么颜色", "是什么形状", "的",
    "是什么", "在", "和", "，", "。", "？", "、", "大的", "小的", "中间", "图片",
)  # fmt: skip


def words():
    """How often each piece of text occurs: Counter of bytes."""
    rng = np.random.default_rng(0)
    texts = [POSITIVE_PROMPT, NEGATIVE_PROMPT, *CHAT, " yes no"] * 3
    for _ in range(400):
        scene = random_scene(rng)
        texts += [caption(scene, False, rng), caption(scene)]
        texts += [text for _, *both in questions(scene) for text in both]
    pieces = Counter(piece.encode() for text in texts for piece in regex.findall("|".join(PIECES), text))
    for word in (*CHINESE_WORDS, *CHINESE.values()):
        pieces[word.encode()] += 10
    return pieces


def merges(pieces):
    """Every byte, then the most frequent pairs until each piece is one token: list of bytes."""
    tokens = [bytes([b]) for b in range(256)]
    split = {piece: [bytes([b]) for b in piece] for piece in pieces}
    while True:
        pairs = Counter()
        for piece, parts in split.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += pieces[piece]
        if not pairs:
            return tokens
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        for piece, parts in split.items():
            joined, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append(b"".join(parts[i : i + step]))
                i += step
            split[piece] = joined


def write(directory, codebook_size, positions):
    """emu3.tiktoken, emu3_vision_tokens.txt and tokenizer_config.json; returns the tokenizer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokens = list(dict.fromkeys(merges(words())))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (directory / "emu3.tiktoken").write_text("".join(lines))
    vision = ["<|image token|>", "<|image start|>", "<|image end|>"]
    vision += [f"<|visual token {code:06d}|>" for code in range(codebook_size)]
    (directory / "emu3_vision_tokens.txt").write_text("".join(f"{token}\n" for token in vision))
    config = {
        "bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>",
        "model_max_length": positions, "padding_side": "left", "tokenizer_class": "Emu3Tokenizer",
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Emu3Tokenizer.from_pretrained(directory)
