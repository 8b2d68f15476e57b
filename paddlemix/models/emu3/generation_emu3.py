# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Prompts to picture codes, and prompts to text: guidance, sampling, the decoding loops.

Every function here works on token ids; text and PIL pictures are the processor's.
"""

import math
from dataclasses import dataclass

import numpy as np
import paddle

from paddlemix.utils import InputError, pad_rows

from .modeling_emu3 import linear

POSITIVE_PROMPT = " masterpiece, film grained, best quality."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


def check_guidance_scale(guidance_scale):
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale must be a finite number, 1 for no guidance, got {guidance_scale}")


@dataclass(frozen=True)
class Sampling:
    """How a visual token is drawn from its logits. top_k=1 is greedy; top_k=0 and top_p=1.0 leave nothing out."""

    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be above 0, got {self.temperature}; top_k=1 gives greedy decoding")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be 0 to 2**63 - 1, got {self.seed}")

    def noise(self, image, position, size):
        """Gumbel noise float32 [size], a fixed function of (seed, image, position)."""
        bits = np.random.Philox(key=self.seed, counter=[0, 0, image, position])
        return np.random.Generator(bits).gumbel(size=size).astype(np.float32)

    def pick(self, logits, images, position):
        """Sample by the Gumbel-max trick: the largest of logits + noise is a draw from their softmax.

        logits: float32 [images, tokens]; images: the pictures' numbers -> int64 [images].
        """
        if self.top_k == 1:
            return logits.argmax(axis=-1)
        logits = self._nucleus(self._top_k(logits / self.temperature))
        noise = np.stack([self.noise(i, position, logits.shape[-1]) for i in images])
        return (logits + paddle.to_tensor(noise)).argmax(axis=-1)

    def _top_k(self, logits):
        if not 0 < self.top_k < logits.shape[-1]:
            return logits
        least = logits.topk(self.top_k, axis=-1)[0][:, -1:]
        return paddle.where(logits < least, -math.inf, logits)

    def _nucleus(self, logits):
        """Keep the likeliest tokens that together reach top_p (Holtzman et al., arXiv 1904.09751)."""
        if self.top_p == 1.0:
            return logits
        ordered = logits.sort(axis=-1, descending=True)
        probabilities = paddle.nn.functional.softmax(ordered, axis=-1)
        before = probabilities.cumsum(axis=-1) - probabilities
        least = paddle.where(before < self.top_p, ordered, math.inf).min(axis=-1, keepdim=True)
        return paddle.where(logits < least, -math.inf, logits)


@dataclass
class Pictures:
    """What `generate_images` gives: codes, int64 [h, w] a picture, and how often the model ran."""

    codes: list
    forward_passes: int


@paddle.no_grad()
def generate_images(
    model, prompts, sizes, grammar, negative_prompts=None, guidance_scale=3.0, sampling=None, on_tokens=None
):
    """Draw pictures, several at a time, each of its own size.

    With guidance (Ho and Salimans, arXiv 2207.12598) the logits are scale * (cond - uncond) + uncond; both
    branches of every picture are rows of one batch. Only the visual tokens' rows of the head are computed.

    Args:
        model: Emu3ForCausalLM.
        prompts: a list of token ids for each picture, ending with the image token (Emu3Processor, mode "G").
        sizes: (h, w) in codes for each picture.
        grammar: ImageGrammar.
        negative_prompts: as prompts; what guidance leads away from. Needed unless guidance_scale is 1.
        guidance_scale: 1 is no guidance.
        sampling: Sampling; the picture is a function of prompt, size and (seed, its number in the batch).
        on_tokens: called with the number of tokens that each step adds, for a progress bar.

    Returns:
        Pictures.
    """
    check_guidance_scale(guidance_scale)
    sampling = sampling or Sampling()
    guided = guidance_scale != 1
    _check_prompts(prompts, sizes, negative_prompts if guided else prompts, grammar)
    rows = [*prompts, *negative_prompts] if guided else list(prompts)
    images = range(len(prompts))
    steps = max(h * (w + 1) - 1 for h, w in sizes)  # what follows the last visual token is known without the model
    input_ids, attention_mask = _pad_left(rows, grammar.pad, steps)
    cache = model.make_cache(len(rows), input_ids.shape[1] + steps)
    head = model.lm_head.weight[grammar.first_visual : grammar.first_visual + grammar.codebook_size]

    drawn = np.zeros([len(prompts), steps], dtype=np.int64)
    for position in range(steps):
        hidden = _last_hidden(model, input_ids, attention_mask, cache)
        forced = [grammar.forced(h, w, position) for h, w in sizes]
        if None in forced:
            logits = linear(hidden, head).astype("float32")
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + guidance_scale * (conditional - unconditional)
            picked = sampling.pick(logits, images, position).numpy() + grammar.first_visual
        drawn[:, position] = [picked[i] if forced[i] is None else forced[i] for i in images]
        input_ids = paddle.to_tensor(np.tile(drawn[:, position], 2 if guided else 1)).unsqueeze(1)
        if on_tokens:
            on_tokens(sum(position < h * (w + 1) - 1 for h, w in sizes))
    if on_tokens:
        on_tokens(4 * len(sizes))  # each picture's last row end and the three tokens that close it
    codes = [grammar.decode(row[: h * (w + 1) - 1].tolist()) for row, (h, w) in zip(drawn, sizes, strict=True)]
    return Pictures(codes, forward_passes=steps)


def _check_prompts(prompts, sizes, negative_prompts, grammar):
    if not prompts or len(prompts) != len(sizes) or negative_prompts is None or len(negative_prompts) != len(prompts):
        raise InputError("give a prompt, a size and, for guidance, a negative prompt for each picture")
    if any(row[-1] != grammar.img for row in [*prompts, *negative_prompts]):
        raise InputError("a drawing prompt must end with the image token: make it with Emu3Processor, mode='G'")
    if any(min(size) < 1 for size in sizes):
        raise InputError(f"a picture has at least one row and one column of tokens, got {list(sizes)}")


@paddle.no_grad()
def generate_text(model, prompts, max_new_tokens=1024):
    """Greedy answers, token by token: yields after each step the new ids, None for rows that have ended.

    Args:
        model: Emu3ForCausalLM.
        prompts: a list of token ids for each row; rows may differ in length.
        max_new_tokens: an end of sequence stops a row earlier.

    Yields:
        list of int or None, one a row. The end of sequence itself is not among them.
    """
    if not prompts or not all(prompts):
        raise InputError("give at least one prompt of at least one token")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    config = model.config
    input_ids, attention_mask = _pad_left(prompts, config.pad_token_id, max_new_tokens)
    cache = model.make_cache(len(prompts), input_ids.shape[1] + max_new_tokens)
    ended = np.zeros(len(prompts), dtype=bool)
    for _ in range(max_new_tokens):
        hidden = _last_hidden(model, input_ids, attention_mask, cache)
        picked = model.lm_head(hidden).argmax(axis=-1).numpy()
        ended |= picked == config.eos_token_id
        yield [None if end else int(token) for token, end in zip(picked, ended, strict=True)]
        if ended.all():
            return
        input_ids = paddle.to_tensor(np.where(ended, config.pad_token_id, picked)).unsqueeze(1)


def _pad_left(rows, pad, room):
    """(input_ids [batch, width], attention_mask [batch, width + room] or None where no row is padded)"""
    input_ids, mask = pad_rows(rows, pad)
    if mask.all():
        return paddle.to_tensor(input_ids), None
    return paddle.to_tensor(input_ids), paddle.to_tensor(np.pad(mask, [(0, 0), (0, room)], constant_values=1))


def _last_hidden(model, input_ids, attention_mask, cache):
    """Hidden state of the last token, [batch, hidden_size]; the new tokens are added to the cache."""
    if attention_mask is not None:
        attention_mask = attention_mask[:, : cache.length + input_ids.shape[1]]
    return model.model(input_ids, attention_mask, past_key_values=cache)[:, -1]
