# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Prompts to picture codes, and prompts to text: guidance, sampling, the decoding loops.

Every function here works on token ids; text and PIL pictures are the processor's.
"""

import math
from dataclasses import dataclass

import numpy as np
import paddle

from paddlemix.external_ops import operators
from paddlemix.utils import InputError, pad_rows

POSITIVE_PROMPT = " masterpiece, film grained, best quality."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)

DECODING = ("auto", "step", "jacobi")
WINDOW = 16  # tokens that a pass of "jacobi" guesses: twice as many save a tenth of the passes more
# Rows of a product on a CPU that take at most about a quarter longer than two, by dtype of the weights; without the
# compiled operators two take as long as one and four twice as long.
CHEAP_ROWS = {"float32": 6, "bfloat16": 6, "int8": 4, "int4": 2}


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

    def pick(self, logits, noise):
        """Sample by the Gumbel-max trick: the largest of logits + noise is a draw from their softmax.

        logits: float32 [..., tokens]; noise: of the same shape, None if greedy -> int64 [...].
        """
        if self.is_greedy:
            return logits.argmax(axis=-1)
        return (self._nucleus(self._top_k(logits / self.temperature)) + noise).argmax(axis=-1)

    @property
    def is_greedy(self):
        return self.top_k == 1

    def _top_k(self, logits):
        if not 0 < self.top_k < logits.shape[-1]:
            return logits
        least = logits.topk(self.top_k, axis=-1, sorted=False)[0].min(axis=-1, keepdim=True)
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
    model,
    prompts,
    sizes,
    grammar,
    negative_prompts=None,
    guidance_scale=3.0,
    sampling=None,
    on_tokens=None,
    decoding="auto",
    window=None,
    drawn=None,
    on_row=None,
):
    """Draw pictures, several at a time, each of its own size.

    With guidance (Ho and Salimans, arXiv 2207.12598) the logits are scale * (cond - uncond) + uncond; both
    branches of every picture are rows of one batch. Only the visual tokens' rows of the head are computed, and what
    the grammar forces takes no pass of its own.

    Args:
        model: Emu3ForCausalLM.
        prompts: a list of token ids for each picture, ending with the image token (Emu3Processor, mode "G").
        sizes: (h, w) in codes for each picture.
        grammar: ImageGrammar.
        negative_prompts: as prompts; what guidance leads away from. Needed unless guidance_scale is 1.
        guidance_scale: 1 is no guidance.
        sampling: Sampling; the picture is a function of prompt, size and (seed, its number in the batch).
        on_tokens: called with the number of tokens that each pass adds, for a progress bar.
        decoding: "step" draws a token a pass. "jacobi" (Teng et al., arXiv 2410.01699) gives each pass guesses of the
            `window` next tokens, too, and keeps those that prove to be the ones drawn: the same picture in fewer,
            larger passes. "auto" chooses the faster one for the device.
        window: of "jacobi"; None for a good one.
        drawn: int64 [pictures, positions], what `on_row` was given in an earlier call: go on from there.
        on_row: called with the tokens so far, as `drawn` takes them, whenever a picture has another row, at the end,
            and before a KeyboardInterrupt goes on its way.

    Returns:
        Pictures. Decoding and `drawn` change the size of the products, thus the rounding of logits, and no token
        unless two candidates are closer than that: rare in float32, less so in 16 bits.
    """
    check_guidance_scale(guidance_scale)
    sampling = sampling or Sampling()
    guided = guidance_scale != 1
    _check_prompts(prompts, sizes, negative_prompts if guided else prompts, grammar)
    rows = [*prompts, *negative_prompts] if guided else list(prompts)
    window = _window(decoding, window, len(rows), _cheap_rows(model))

    drawing = _Drawing(sizes, grammar, window, drawn)
    prompt, attention_mask = _pad_left(rows, grammar.pad, drawing.total)
    cache = model.make_cache(len(rows), prompt.shape[1] + drawing.total)
    visual = slice(grammar.first_visual, grammar.first_visual + grammar.codebook_size)
    noise = _Noise(sampling, len(prompts), drawing.total, grammar.codebook_size)

    def pick(hidden, noise):
        logits = model.lm_head(hidden, visual).astype("float32")
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance_scale * (conditional - unconditional)
        return sampling.pick(logits, noise) + grammar.first_visual

    decoder, passes = _Decoder(model, cache, attention_mask, pick), 0
    try:
        while span := drawing.next_span():
            feed = drawing.ids[:, drawing.fed : span.stop - 1]
            feed = paddle.concat([feed, feed]) if guided else feed
            feed = feed if cache.length else paddle.concat([prompt, feed], axis=1)
            added, row_ended = drawing.take(span, decoder(feed, span.stop - span.start, noise(span)))
            cache.length = prompt.shape[1] + drawing.fed
            passes += 1
            if on_tokens:
                on_tokens(added)
            if on_row and row_ended:
                on_row(drawing.drawn())
    except KeyboardInterrupt:
        if on_row and drawing.known:
            on_row(drawing.drawn())
        raise
    drawing.known = drawing.total
    if on_row:
        on_row(drawing.drawn())
    if on_tokens:
        on_tokens(4 * len(sizes))  # each picture's last row end and the three tokens that close it
    return Pictures(drawing.codes(), passes)


class _Drawing:
    """The pictures' tokens, [pictures, total]: drawn up to `known`, from there on forced by the grammar or guessed.

    What follows the longest picture's last visual token is left out: it is known without the model.
    """

    def __init__(self, sizes, grammar, window, drawn=None):
        self.grammar, self.window = grammar, window
        self.forced = grammar.forced_ids(sizes)[:, :-1]
        self.total = self.forced.shape[1]
        ids = np.where(self.forced < 0, grammar.first_visual, self.forced)
        self.known = 0 if drawn is None else _check_drawn(drawn, self.forced, grammar)
        self.fed = 0  # tokens whose keys and values the cache holds for good
        if drawn is not None:
            ids[:, : self.known] = drawn
        self.ids, self.is_forced = paddle.to_tensor(ids), paddle.to_tensor(self.forced >= 0)
        self.is_open = (self.forced < 0).any(axis=0)  # some picture has a visual token there
        self.ends_row = (self.forced == grammar.eol).any(axis=0)
        self.body = np.array([h * (w + 1) - 1 for h, w in sizes])

    def next_span(self):
        """The positions that the next pass draws, all but the last also guessed: a slice, None at the end."""
        if not self.is_open[self.known :].any():
            return None
        start = self.known + int(self.is_open[self.known :].argmax())
        return slice(start, min(start + 1 + self.window, self.total))

    def take(self, span, sampled):
        """Take the tokens sampled for a span, int64 [pictures, span], as far as they follow right guesses.

        Returns how many tokens the pictures gained, and whether one has a row more.
        """
        picked = sampled
        if (self.forced[:, span] >= 0).any():
            picked = paddle.where(self.is_forced[:, span], self.ids[:, span], sampled)
        right = 1 if span.stop == span.start + 1 else _first_right(picked, self.ids[:, span])
        self.ids[:, span] = picked
        if self.window:  # what comes new into the next span: more of the same is the best first guess
            new = slice(span.stop, min(span.stop + right + 1, self.total))
            self.ids[:, new] = paddle.where(self.is_forced[:, new], self.ids[:, new], sampled[:, -1:])
        before, self.known, self.fed = self.known, span.start + right, span.start + right - 1
        added = np.minimum(self.known, self.body) - np.minimum(before, self.body)
        # a row's end is known with its last token
        return int(added.sum()), bool(self.ends_row[before + 1 : self.known + 1].any())

    def drawn(self):
        """The tokens up to `known`, int64 [pictures, known]."""
        return self.ids[:, : self.known].numpy()

    def codes(self):
        """Each picture's codes, int64 [h, w]."""
        return [self.grammar.decode(row[:n].tolist()) for row, n in zip(self.ids.numpy(), self.body, strict=True)]


def _cheap_rows(model):
    """How many rows a pass takes at hardly more cost than one; None on a GPU, where a window is far from the limit."""
    if _on_gpu(model):
        return None
    return CHEAP_ROWS.get(model.weight_dtype, 2) if operators() else 2


def _on_gpu(model):
    return not model.lm_head.weight.place.is_cpu_place()


def _window(decoding, window, rows, cheap_rows):
    """How many tokens a pass guesses; 0 is step by step."""
    if decoding not in DECODING:
        raise InputError(f"decoding must be one of {', '.join(DECODING)}, got {decoding!r}")
    if window is not None and window < 1:
        raise InputError(f"window must be 1 or more, got {window}")
    if decoding == "step":
        return 0
    if decoding == "auto" and cheap_rows:
        return cheap_rows // rows if cheap_rows >= 2 * rows else 0
    return window or WINDOW


def _first_right(picked, guesses):
    """How many of `picked` [pictures, positions] were drawn after right guesses alone, in every picture."""
    agree = (picked[:, :-1] == guesses[:, :-1]).all(axis=0).astype("int64")
    return 1 + int(agree.cumprod(0).sum())


class _Noise:
    """Sampling's noise on the device, made and brought there some positions at a time."""

    AHEAD = 32

    def __init__(self, sampling, images, total, size):
        self.sampling, self.images, self.total, self.size = sampling, images, total, size
        self.first = self.end = 0

    def __call__(self, span):
        """float32 [images, span, size]; None if nothing is drawn by chance."""
        if self.sampling.is_greedy:
            return None
        start, end = span.start, span.stop
        if end > self.end:
            self.first, self.end = start, max(end, min(start + self.AHEAD, self.total))
            positions = range(self.first, self.end)
            made = [[self.sampling.noise(i, p, self.size) for p in positions] for i in range(self.images)]
            self.noise = _upload(np.array(made))
        return self.noise[:, start - self.first : end - self.first]


def _upload(array):
    """A tensor on the device. A card is not waited for: pinned memory is copied in its turn, and Paddle keeps it."""
    if paddle.get_device().startswith("gpu"):
        return paddle.to_tensor(array, place=paddle.CUDAPinnedPlace()).cuda(blocking=False)
    return paddle.to_tensor(array)


def _check_drawn(drawn, forced, grammar):
    """The number of positions in `drawn`; InputError where they are none of these pictures'."""
    drawn = np.asarray(drawn)
    shape = drawn.shape
    if drawn.dtype.kind != "i" or len(shape) != 2 or shape[0] != len(forced) or shape[1] > forced.shape[1]:
        raise InputError(
            f"drawn must be int64 [pictures, positions], at most {list(forced.shape)}, got {drawn.dtype} {list(shape)}"
        )
    expected = forced[:, : drawn.shape[1]]
    is_visual = (grammar.first_visual <= drawn) & (drawn < grammar.first_visual + grammar.codebook_size)
    if not np.where(expected < 0, is_visual, drawn == expected).all():
        raise InputError("drawn holds tokens that cannot stand where they do: it is of pictures of other sizes")
    return drawn.shape[1]


def _check_prompts(prompts, sizes, negative_prompts, grammar):
    if not prompts or len(prompts) != len(sizes) or negative_prompts is None or len(negative_prompts) != len(prompts):
        raise InputError("give a prompt, a size and, for guidance, a negative prompt for each picture")
    if any(row[-1] != grammar.img for row in [*prompts, *negative_prompts]):
        raise InputError("a drawing prompt must end with the image token: make it with Emu3Processor, mode='G'")
    if any(min(size) < 1 for size in sizes):
        raise InputError(f"a picture has at least one row and one column of tokens, got {list(sizes)}")


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
    decoder = _Decoder(model, cache, attention_mask, lambda hidden, _: model.lm_head(hidden).argmax(axis=-1))
    ended = np.zeros(len(prompts), dtype=bool)
    for _ in range(max_new_tokens):
        with paddle.no_grad():  # not across a yield: what the caller does there is the caller's
            input_ids = decoder(input_ids)
        picked = input_ids[:, 0].numpy()
        ended |= picked == config.eos_token_id
        yield [None if end else int(token) for token, end in zip(picked, ended, strict=True)]
        if ended.all():
            return


def _pad_left(rows, pad, room):
    """(input_ids [batch, width], attention_mask [batch, width + room] or None where no row is padded)"""
    input_ids, mask = pad_rows(rows, pad)
    if mask.all():
        return paddle.to_tensor(input_ids), None
    return paddle.to_tensor(input_ids), paddle.to_tensor(np.pad(mask, [(0, 0), (0, room)], constant_values=1))


class _Decoder:
    """Passes of the model over tokens new to its cache, and what is picked from the last hidden states.

    Args:
        pick: of hidden states [batch, count, hidden_size] and noise (or None) makes int64 [batch or pictures, count].
    """

    def __init__(self, model, cache, attention_mask, pick):
        self.model, self.cache, self.attention_mask, self.pick = model, cache, attention_mask, pick
        self.steps = {}

    def __call__(self, feed, count=1, noise=None):
        """What is picked from the last `count` of the tokens that are fed, int64 [batch, new].

        On a GPU the next pass of the same shape overwrites it.
        """
        past, length = self.cache.length, self.cache.length + feed.shape[1]
        if not past or not _on_gpu(self.model):
            mask = None if self.attention_mask is None else self.attention_mask[:, :length]
            return self.pick(self.model.model(feed, mask, past_key_values=self.cache)[:, -count:], noise)
        if length > self.cache.room:
            self.cache.reserve(length)
            self.steps.clear()
        shape = feed.shape[1], count
        if shape not in self.steps:
            self.steps[shape] = _Step(self, feed, count, noise)
        self.cache.length = length
        return self.steps[shape](feed, past, noise)


class _Step:
    """A pass for a GPU: what changes from one to the next is in tensors of fixed shape and address.

    So a CUDA graph of `run` could be replayed at each position.
    """

    def __init__(self, decoder, feed, count, noise):
        self.model, self.cache, self.pick, self.count = decoder.model, decoder.cache, decoder.pick, count
        mask, room = decoder.attention_mask, self.cache.room
        self.allowed = None if mask is None else mask[:, :room].astype("bool").reshape([-1, 1, 1, room])
        self.feed, self.past = paddle.empty_like(feed), paddle.zeros([1], "int64")
        self.noise = None if noise is None else paddle.empty_like(noise)
        self.picked = None

    def __call__(self, feed, past, noise):
        self.feed.copy_(feed, False)
        self.past.fill_(past)
        if noise is not None:
            self.noise.copy_(noise, False)
        self.run()
        return self.picked

    def run(self):
        hidden = self.model.model.step(self.feed, self.past, self.allowed, self.cache)
        picked = self.pick(hidden[:, -self.count :], self.noise)
        if self.picked is None:
            self.picked = picked
        else:  # where the first pass put it
            self.picked.copy_(picked, False)
