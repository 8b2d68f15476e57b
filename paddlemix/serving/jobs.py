# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the engine is asked for, and what it answers: jobs, events and results. The engine's thread alone calls a job's
methods with an underscore, and its listener."""

import logging
import secrets
import time
from dataclasses import dataclass

from PIL import Image

from paddlemix.pipelines.emu3 import answer_sampling
from paddlemix.pipelines.steps import LONGEST_ANSWER, answer_text
from paddlemix.processors.emu3_processing import generate_size
from paddlemix.processors.image_processing_emu3 import over_white, to_pil
from paddlemix.processors.prompts import merge_turns
from paddlemix.utils import InputError, shown, whole_number, whole_numbers

TELL_S = 0.05  # between two Progress events of a job


# --- events


@dataclass
class Queued:
    """The job waits; `place` 1 is the next one."""

    place: int


@dataclass
class Progress:
    """Tokens and rows up to now; `total` tokens at most, 0 rows of an answer."""

    tokens: int
    total: int
    rows: int
    rows_total: int
    tokens_per_s: float


@dataclass
class Partial:
    """Picture `index` up to now, a PIL picture; `number` 0, 1, ... of its previews."""

    index: int
    image: object
    number: int


@dataclass
class Text:
    """What comes new to an answer, in whole characters."""

    text: str


@dataclass
class Done:
    """The last event of a job that went well. Draw: Drawn; Chat: Written; Encode: int64 [h, w]; Decode: PIL picture."""

    result: object


@dataclass
class Failed:
    """The last event of a job that did not: InputError, Unavailable, or what went wrong inside the model."""

    error: Exception


@dataclass
class Drawn:
    """`pictures`: (PIL picture, metadata) of each; `tokens` of all of them."""

    pictures: list
    prompt_tokens: int
    tokens: int


@dataclass
class Written:
    """`finish_reason`: "stop" or "length"; `cached_tokens` of the prompt were read before for another answer."""

    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int
    cached_tokens: int


# --- jobs


class Job:
    """`listen(callback)` before `submit`: callback(event) is called in the engine's thread and must not block."""

    rows = 0  # rows of a batch that one of its sequences takes
    uses_batch = False

    def __init__(self, pipeline_name):
        self.pipeline_name, self.id = pipeline_name, secrets.token_hex(8)
        self.callback, self.cancelled, self.place = None, False, None
        self.is_recovered = False  # accepted by an earlier process
        self.pipeline = None
        self.sequences, self.waiting = [], []  # all of them, and those that have not joined yet
        self.tokens, self.started, self.told = 0, 0.0, 0.0

    def listen(self, callback):
        self.callback = callback

    def check(self, pipeline):
        """InputError for what cannot be. In the caller's thread; nothing is loaded."""

    def tell(self, event):
        if self.callback is None or self.cancelled:
            return
        try:
            self.callback(event)
        except Exception:  # a listener's mistake is not the engine's
            logging.getLogger(__name__).exception("request %s: its listener failed", self.id)
            self.cancelled = True

    def _prepare(self, engine, batch):
        """Make the sequences."""

    def _start(self):
        """Its first sequence has joined."""
        self.started = time.monotonic()
        self.tell(Progress(*self._progress(), 0.0))

    def _advance(self, engine):
        """After a pass. Returns how many tokens were gained."""
        now, before, (self.tokens, *others) = time.monotonic(), self.tokens, self._progress()
        if self.tokens > before and now - self.told >= TELL_S:
            self.told = now
            rate = self.tokens / (now - self.started) if now > self.started else 0.0
            self.tell(Progress(self.tokens, *others, rate))
        return self.tokens - before

    def _is_done(self):
        return all(sequence.is_done for sequence in self.sequences)


def check_options(given, known):
    if unknown := set(given) - set(known):
        raise InputError(f"unknown options: {', '.join(sorted(unknown))}; known are {', '.join(known)}")


class Draw(Job):
    """Pictures of a prompt.

    Args:
        pipeline_name: of the engine's.
        prompt: a text.
        n: how many pictures.
        options: a dict of Emu3Pipeline.generate_steps' arguments.
        partial_images: previews of each picture, at most.
        most_pixels: that a picture may have; None is any number.
    """

    uses_batch = True

    def __init__(self, pipeline_name, prompt, n=1, options=None, partial_images=0, most_pixels=None):
        super().__init__(pipeline_name)
        self.prompt, self.n, self.partial_images, self.most_pixels = prompt, n, partial_images, most_pixels
        self.options = {name: value for name, value in (options or {}).items() if value is not None}

    def check(self, pipeline):
        if not isinstance(self.prompt, str):
            raise InputError(f"prompt must be a text, got {shown(self.prompt)}")
        self.partial_images = whole_number("partial_images", self.partial_images, "a whole number, 0 or more", 0)
        check_options(self.options, DRAW_OPTIONS)
        self.options.setdefault("seed", secrets.randbits(32))
        _, ratios, area, *_ = pipeline.check_generate(self.prompt, num_images=self.n, **self.options)
        for height, width in {generate_size(ratio, area) for ratio in ratios}:  # of 8 x 8 pixels
            if self.most_pixels and 64 * height * width > self.most_pixels:
                size = f"{8 * width} x {8 * height} pixels"
                raise InputError(f"the image would have {size}, at most {self.most_pixels} are drawn here")

    @property
    def seed(self):
        return self.options["seed"]

    def record(self):
        """What draws it again, for a file of JSON."""
        return {"pipeline": self.pipeline_name, "prompt": self.prompt, "n": self.n, "options": self.options}

    def _prepare(self, engine, batch):
        self.generation = self.pipeline.generate_steps(self.prompt, num_images=self.n, batch=batch, **self.options)
        self.sequences = list(self.generation.drawings)
        self.rows = len(self.sequences[0].prompts)
        self.images, self.previews, self.sent = [None] * self.n, [0] * self.n, [0] * self.n

    def _progress(self):
        heights = sum(height for height, _ in self.generation.codes)
        return self.generation.gained, self.generation.tokens, self.generation.rows_drawn, heights

    def _advance(self, engine):
        for i, drawing in enumerate(self.sequences):
            if drawing.is_done and self.images[i] is None:
                self.images[i] = engine.with_memory(self.generation.image, i)
            elif not drawing.is_done and self.partial_images:
                self._preview(engine, i, drawing)
        return super()._advance(engine)

    def _preview(self, engine, i, drawing):
        due = drawing.rows * (self.partial_images + 1) // drawing.size[0]  # 0 to partial_images
        if due <= self.previews[i]:
            return
        codes = drawing.rows * drawing.size[1]
        if not engine.previews.may_take(codes):
            return  # the next one shows more
        try:
            with engine.previews.measured(codes):
                image = self.generation.image(i)
        except (InputError, MemoryError):  # a picture's features may not fit beside the cache
            return
        finally:
            self.previews[i] = due
        self.tell(Partial(i, image, self.sent[i]))
        self.sent[i] += 1

    def _result(self):
        pictures = [(image, self.generation.metadata(i)) for i, image in enumerate(self.images)]
        return Drawn(pictures, len(self.generation.rows[0][0]), self.generation.tokens)


DRAW_OPTIONS = (
    "negative_prompt", "ratio", "height", "width", "guidance_scale", "temperature", "top_k", "top_p", "seed",
)  # fmt: skip


class Chat(Job):
    """An answer.

    Args:
        pipeline_name: of the engine's.
        turns: [(role, [part, ...])], a part is a text or a PIL picture.
        max_new_tokens: None is 1,024; at most what the model has positions for.
        options: temperature, top_k, top_p and seed, as Emu3Pipeline.understand takes them.
        stop: texts that end the answer, and are not in it.
    """

    rows, uses_batch = 1, True

    def __init__(self, pipeline_name, turns, max_new_tokens=None, options=None, stop=()):
        super().__init__(pipeline_name)
        self.turns, self.max_new_tokens = turns, max_new_tokens
        self.options = {name: value for name, value in (options or {}).items() if value is not None}
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        self.text, self.is_stopped = "", False

    def check(self, pipeline):
        if self.max_new_tokens is not None:
            name, accepted = "max_new_tokens", "1 or more, a whole number"
            self.max_new_tokens = whole_number(name, self.max_new_tokens, accepted, 1)
        check_options(self.options, CHAT_OPTIONS)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop must be texts of at least one character, got {shown(self.stop)}")
        self.sampling = answer_sampling(**self.options)
        for _, parts in self.turns:
            if not all(isinstance(part, (str, Image.Image)) for part in parts):
                raise InputError("a message's parts must be texts and PIL pictures")
        merge_turns(self.turns)

    def _prepare(self, engine, batch):
        from paddlemix.models.emu3.sequences import Answer

        processor, limit = self.pipeline.processor, self.pipeline.config.max_position_embeddings
        turns = [
            (role, [part if isinstance(part, str) else over_white(to_pil(part))[0] for part in parts])
            for role, parts in self.turns
        ]
        sizes = iter(processor.chat_sizes(turns, limit))
        codes = [
            (role, [p if isinstance(p, str) else engine.codes(self.pipeline, p, next(sizes)) for p in parts])
            for role, parts in turns
        ]
        prompt = processor.chat_prompt(codes)
        if len(prompt) >= limit:
            raise InputError(f"the messages have {len(prompt)} tokens, the model has {limit} positions: shorten them")
        room = max(1, limit - len(prompt))
        most = min(room, LONGEST_ANSWER if self.max_new_tokens is None else self.max_new_tokens)
        batch.require_memory(len(prompt) + most)
        self.sequences = [Answer(prompt, most, self.pipeline.config, self.sampling)]

    def _progress(self):
        answer = self.sequences[0]
        return len(answer.ids), answer.max_new_tokens, 0, 0

    def _advance(self, engine):
        text = answer_text(self.pipeline.processor.tokenizer, self.sequences[0])
        end = min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=None)
        self.is_stopped = end is not None
        if not self.is_stopped:
            end = len(text) - (0 if self.sequences[0].is_done else _begun(text, self.stop))
        if end > len(self.text):
            new, self.text = text[len(self.text) : end], text[:end]
            self.tell(Text(new))
        return super()._advance(engine)

    def _is_done(self):
        return self.is_stopped or super()._is_done()

    def _result(self):
        answer = self.sequences[0]
        reason = "stop" if self.is_stopped or answer.ended else "length"
        return Written(self.text, reason, len(answer.prompts[0]), len(answer.ids), answer.reused)


CHAT_OPTIONS = "temperature", "top_k", "top_p", "seed"


def _begun(text, stops):
    """How many characters at the end of a text may be the beginning of one that stops it."""
    lengths = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)


class Encode(Job):
    """The codes of a PIL picture."""

    def __init__(self, pipeline_name, image):
        super().__init__(pipeline_name)
        self.image = image

    def _prepare(self, engine, batch):
        self.codes = engine.codes(self.pipeline, self.image)

    def _result(self):
        return self.codes


class Decode(Job):
    """The PIL picture of codes, integers [h, w]."""

    def __init__(self, pipeline_name, codes):
        super().__init__(pipeline_name)
        self.codes = codes

    def check(self, pipeline):
        self.codes = whole_numbers("codes", self.codes, 0)
        if self.codes.ndim != 2 or 0 in self.codes.shape:
            raise InputError(f"codes must be rows of whole numbers, [h, w], got {shown(self.codes.tolist())}")

    def _prepare(self, engine, batch):
        self.image = engine.with_memory(self.pipeline.processor.decode_image, self.codes)

    def _result(self):
        return self.image
