# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Workers: rows in, rows out. No file is known here, and no process.

A worker has `has_room`, takes a row by `add(number, row)`, works a little in `step()`, which returns (number, values)
of the rows that are finished, in any order, and is true while it has a row. Values are a dict of columns. A row with
which something is wrong is finished with an `error`. What becomes of a row depends on nothing but the row and the
worker's own arguments; bit for bit on a CPU. Whoever makes a worker for a job sets its `job`, a dict that says what
these are.
"""

import hashlib
import io
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from paddlemix.machine import NotEnoughMemory
from paddlemix.pipelines.steps import answer_text
from paddlemix.processors import Emu3VisionVQImageProcessor
from paddlemix.processors.video import VideoFile, read_frames
from paddlemix.results import png_info
from paddlemix.utils import InputError, shown, whole_number, whole_numbers

from .inputs import first_given, image_of, printable, text_of

WAITING = 8  # batches' worth of images that wait for others of their size
DRAWING = (
    "negative_prompt", "ratio", "height", "width", "guidance_scale", "temperature", "top_k", "top_p", "seed",
)  # fmt: skip
ANSWERING = "max_new_tokens", "temperature", "top_k", "top_p", "seed"


def schema():
    """The columns of what `emu3 batch` writes, pyarrow's."""
    import pyarrow as pa

    return pa.schema([
        ("id", pa.string()),
        ("codes", pa.list_(pa.int32())),  # height * width, row by row; of a video as many times as it has frames
        ("frames", pa.int32()),  # of codes, each of 4 of the video; null of an image
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("answer", pa.string()),
        ("seed", pa.int64()),  # that the picture or the answer was drawn with
        ("error", pa.string()),
        ("source", pa.string()),  # "prompts.jsonl:17"
    ])  # fmt: skip


def run(worker, rows):
    """(number, values) of each of the numbered rows, in any order. Rows are read as the worker has room for them."""
    rows = iter(rows)
    while True:
        while worker.has_room and (one := next(rows, None)) is not None:
            worker.add(*one)
        if not worker:
            return
        yield from worker.step()


def in_order(numbered):
    """(0, a), (2, c), (1, b) ... in any order -> a, b, c: each as soon as all before it have come."""
    early, number = {}, 0
    for i, item in numbered:
        early[i] = item
        while number in early:
            yield early.pop(number)
            number += 1


def begin(row):
    """The values that every row has."""
    return {"id": row.id, "source": row.source, "error": None if row.error is None else printable(row.error)}


def asked(row, options, names):
    """The values of a worker's options for a row: its own come first. A seed that it does not have is of its id, so
    that no two rows without one are drawn with the same noise, and the order does not matter."""
    own = {name: row.values[name] for name in names if row.values.get(name) is not None}
    for name, value in own.items():
        if isinstance(value, float) and value.is_integer():  # pandas' way of whole numbers in a column with gaps
            own[name] = int(value)
    if own.get("seed") is None:
        digest = hashlib.sha256(f"{options['seed']} {row.id}".encode()).digest()
        own["seed"] = int.from_bytes(digest[:4], "big")
    return {**options, **own}


def codes_values(codes):
    """The columns of codes [h, w], or [frames, h, w]."""
    values = dict(zip(("width", "height", "frames"), codes.shape[::-1]))
    return {"codes": codes.astype(np.int32).ravel(), **values}


def png(image, text=None):
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=png_info(text or {}))
    return file.getvalue()


class DecodeTokens:
    """Rows that the language model decodes: they join its Batch as others leave (continuous batching).

    Args:
        pipeline: Emu3Pipeline.
        prepare: a function of a row and the batch that returns a Drawing or an Answer, and a function that gives its
            columns when it is done.
        rows: of the batch that a sequence takes at most.
        batch_size: sequences together at most; None is as many as one pass takes, and the memory.
    """

    def __init__(self, pipeline, prepare, rows, batch_size=None):
        from paddlemix.models.emu3 import Batch

        self.batch, self.prepare, self.rows, self.batch_size = Batch(pipeline.model), prepare, rows, batch_size
        self.running, self.decoded, self.finished = {}, [], []
        self.waiting = None  # a row for which there is no memory until another has left

    def __bool__(self):
        return bool(self.running or self.decoded or self.finished or self.waiting)

    @property
    def has_room(self):
        used = sum(map(len, self.batch.slots.values()))
        fits = not used or used + self.rows <= self.batch.pass_rows
        is_full = self.batch_size is not None and len(self.running) >= self.batch_size
        return fits and not (is_full or self.waiting or self.decoded)

    def add(self, number, row):
        self.waiting = number, row, begin(row)
        self._join()

    def _join(self):
        number, row, values = self.waiting
        try:
            if row.error is None:
                sequence, finish = self.prepare(row, self.batch)
                self.batch.join(sequence)
                self.running[sequence] = number, values, finish
            else:
                self.finished.append((number, values))
        except (InputError, MemoryError) as error:
            if isinstance(error, (NotEnoughMemory, MemoryError)) and (self.running or self.batch.cache is not None):
                if not self.running:
                    self.batch.give_up()  # the cache
                    self._join()
                return
            if isinstance(error, MemoryError):
                raise
            self.finished.append((number, {**values, "error": printable(str(error))}))
        self.waiting = None

    def step(self):
        done, self.finished = self.finished, []
        for sequence, _ in self.batch.step() if self.batch else ():
            if sequence.is_done:
                self.decoded.append(self.running.pop(sequence))
        while self.decoded:
            number, values, finish = self.decoded[0]
            try:
                done.append((number, {**values, **finish()}))
            except (NotEnoughMemory, MemoryError):
                if self.running:
                    break  # until others have left
                if self.batch.cache is None:
                    raise
                self.batch.give_up()  # the cache
            else:
                del self.decoded[0]
        if self.waiting and done:
            self._join()
        return done


def generate(pipeline, options, batch_size=None, images=False):
    """The worker of text-to-image: of each row's `prompt` one picture, that of Emu3Pipeline.generate with its seed.

    Args:
        pipeline: Emu3Pipeline.
        options: of Emu3Pipeline.generate_steps, where a row has no such value; a whole number `seed` among them.
        batch_size: pictures that are drawn together at most.
        images: whether to decode them, into the value `png`, bytes.
    """

    def prepare(row, batch):
        values = row.values
        prompt = text_of("prompt", first_given(values, "prompt", "text"))
        generation = pipeline.generate_steps(prompt, batch=batch, **asked(row, options, DRAWING))

        def finish():
            own = {"seed": generation.seed, **codes_values(generation.drawings[0].codes())}
            return {**own, "png": png(generation.image(0), generation.metadata(0))} if images else own

        return generation.drawings[0], finish

    return DecodeTokens(pipeline, prepare, 2, batch_size)


def understand(pipeline, options, question, batch_size=None):
    """The worker of image question answering: the `answer` to each row's `question` about its `image`.

    Args: as `generate` takes them; options of Emu3Pipeline.understand_steps; the question of rows without one.
    """

    def prepare(row, batch):
        values = asked(row, options, ANSWERING)
        own = text_of("question", row.values.get("question") or row.values.get("text") or question)
        answer = pipeline.understand_steps(image_of(row, row.values.get("image")), own, **values).answers[0]

        def finish():
            text = answer_text(pipeline.processor.tokenizer, answer)
            return {"answer": text, "seed": None if answer.sampling.is_greedy else values["seed"]}

        return answer, finish

    return DecodeTokens(pipeline, prepare, 1, batch_size)


class Encode:
    """Rows whose images the vision tokenizer encodes, those of one size together, and once where several rows in turn
    have the same.

    Args:
        model: Emu3VisionVQModel.
        read: a function of a Row and of its values, to which it may add, that returns pixels, float32 [3, H, W], or of
            a video an iterator as Emu3Pipeline.video_clips; InputError for a bad row.
        batch_size: images that are encoded together.
        threads: that read beside.
    """

    def __init__(self, model, read, batch_size=1, threads=1):
        self.model, self.read, self.batch_size = model, read, batch_size
        self.pool, self.most = ThreadPoolExecutor(threads, "emu3-rows"), 2 * batch_size + threads
        # of each size the images that wait for others, the first at first, each with the (number, values) of its rows
        self.reading, self.groups = deque(), {}

    def __bool__(self):
        return bool(self.reading or self.groups)

    @property
    def has_room(self):
        return len(self.reading) < self.most

    def add(self, number, row):
        self.reading.append(self.pool.submit(self._read, number, row))

    def _read(self, number, row):
        values, pixels = begin(row), None
        if row.error is None:
            try:
                pixels = self.read(row, values)
            except InputError as error:
                values["error"] = printable(str(error))
        return number, values, pixels

    def step(self):
        """One image more is read, and a group encoded where it is full, or waits for long, or nothing more comes. It is
        full when one image too many comes: before, the next row may have its last image."""
        if not self.reading:
            return self._encode(next(iter(self.groups)))
        number, values, pixels = self.reading.popleft().result()
        if not isinstance(pixels, np.ndarray):
            if pixels is not None:
                values.update(self._encode_video(pixels))
            return [(number, values)]
        done, group = [], self.groups.get(pixels.shape, [])
        if group and np.array_equal(group[-1][0], pixels):
            group[-1][1].append((number, values))
        else:
            if len(group) == self.batch_size:
                done = self._encode(pixels.shape)
            self.groups.setdefault(pixels.shape, []).append((pixels, [(number, values)]))
        first = next(iter(self.groups))
        [(oldest, _), *_] = self.groups[first][0][1]
        return done + (self._encode(first) if number - oldest >= WAITING * self.batch_size else [])

    def _encode(self, shape):
        group = self.groups.pop(shape)
        codes = self._codes(np.stack([pixels for pixels, _ in group]))
        return [
            (number, {**values, **codes_values(own)})
            for (_, rows), own in zip(group, codes, strict=True)
            for number, values in rows
        ]

    def _encode_video(self, clips):
        """Clip by clip, so that memory does not grow with its length."""
        try:
            return codes_values(np.concatenate([self._codes(pixels)[0].astype(np.int32) for pixels, _ in clips]))
        except InputError as error:
            return {"error": printable(str(error))}

    def _codes(self, pixels):
        import paddle

        with paddle.no_grad():
            return self.model.encode(paddle.to_tensor(pixels)).numpy()


def make_processor(vq_model_path, image_area):
    """The image processor of a vision tokenizer. A bound of its sizes that `image_area` is beyond gives way."""
    area = whole_number("image_area", image_area, "a number of pixels from 64 to 67108864", 64, 1 << 26)
    processor = Emu3VisionVQImageProcessor.from_pretrained(vq_model_path)
    if area < processor.min_pixels:
        processor.min_pixels = 1
    if area > processor.max_pixels:
        processor.max_pixels = 1 << 40
    return processor


def pixels_of(image, processor, image_area):
    """A PIL image -> float32 [3, H, W] in [-1, 1], by the recipe of the original's prepare_data.py: scaled to about
    `image_area` pixels with Pillow's usual filter, then by the processor to sides that the vision tokenizer takes."""
    scale = (image_area / (image.width * image.height)) ** 0.5
    width, height = (int(round(side * scale)) for side in image.size)
    size = processor.resized(height, width)  # InputError where the image is too narrow, before Pillow's
    return processor(image.resize((width, height)), size=size)["pixel_values"][0]


def encode(pipeline, image_area=None, batch_size=1, threads=1):
    """The worker that encodes each row's `image`, or `video`, a file, as Emu3Pipeline.autoencode does; where
    `image_area` is given, images are scaled as `emu3 prepare` does. The other arguments are of Encode."""
    processor = pipeline.image_processor if image_area is None else make_processor(pipeline.vq_model_path, image_area)

    def read(row, values):
        if row.values.get("video") is not None:
            return pipeline.video_clips(read_frames(row.folder / text_of("video", row.values["video"])))
        image = image_of(row, row.values.get("image"))
        return processor(image)["pixel_values"][0] if image_area is None else pixels_of(image, processor, image_area)

    return Encode(pipeline.vision_tokenizer, read, batch_size, threads)


class Decode:
    """Rows of `codes`, with `height` and `width` or [h, w] by themselves, to the value `png`, bytes; of videos, which
    have `frames` as well, to `mp4`.

    Args:
        pipeline: Emu3Pipeline, whose vision tokenizer decodes them.
        frame_rate: of videos.
    """

    def __init__(self, pipeline, frame_rate=25):
        self.pipeline, self.frame_rate, self.rows = pipeline, frame_rate, []

    def __bool__(self):
        return bool(self.rows)

    @property
    def has_room(self):
        return not self.rows

    def add(self, number, row):
        self.rows.append((number, row))

    def step(self):
        number, row = self.rows.pop()
        values = begin(row)
        try:
            if row.error is None:
                codes = codes_of(row.values)
                content = {"png": png(*self._decode(codes))} if codes.ndim == 2 else {"mp4": self._video(codes)}
                values.update(zip(("width", "height", "frames"), codes.shape[::-1]), **content)
        except InputError as error:
            values["error"] = printable(str(error))
        return [(number, values)]

    def _video(self, codes):
        """Clip by clip, so that memory does not grow with its length."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "video.mp4")
            with VideoFile(path, Fraction(self.frame_rate).limit_denominator(1001)) as video:
                for clip in codes:
                    for image in self._decode(clip[None]):
                        video.add(image)
            return path.read_bytes()

    def _decode(self, codes):
        """[h, w] -> a PIL image in a list; [1, h, w] -> those of the frames"""
        import paddle

        with paddle.no_grad():
            pixels = self.pipeline.vision_tokenizer.decode(paddle.to_tensor(codes[None]))
        return self.pipeline.image_processor.postprocess(pixels.reshape([-1, *pixels.shape[-3:]]))["pixel_values"]


def codes_of(values):
    """The codes of a row, int64 [h, w], or [frames, h, w] of a video.

    InputError: it has none, or not as many as its frames, height and width say.
    """
    if values.get("codes") is None:
        raise InputError("codes are missing")
    codes = whole_numbers("codes", values["codes"], 0)
    if codes.ndim == 1:
        names = ["height", "width"] if values.get("frames") is None else ["frames", "height", "width"]
        shape = [whole_number(name, values.get(name), "1 or more, a whole number", 1) for name in names]
        if math.prod(shape) != codes.size:
            raise InputError(f"{codes.size} codes cannot be {' x '.join(map(str, shape))}")
        return codes.reshape(shape)
    if codes.ndim != 2 or not codes.size:
        raise InputError(f"codes must be rows of whole numbers, [h, w], got {shown(values['codes'])}")
    return codes
