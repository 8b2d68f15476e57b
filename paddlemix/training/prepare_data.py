# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Images and texts to what training reads: rows of visual codes and texts."""

import numpy as np

from paddlemix.jobs.inputs import image_of, printable, text_of
from paddlemix.jobs.order import ahead, groups, in_order
from paddlemix.processors.image_processing_emu3 import Emu3VisionVQImageProcessor
from paddlemix.utils import InputError, shown, whole_number

WAITING = 8  # batches' worth of images that wait for others of their size
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names
MARK = "<image>"  # where an image stands in the text of messages


def schema():
    """The columns of prepared data, pyarrow's."""
    import pyarrow as pa

    turn = pa.struct([("text", pa.string()), ("response", pa.string())])
    return pa.schema([
        ("id", pa.string()),
        ("text", pa.string()),  # the caption, or the question
        ("codes", pa.list_(pa.int32())),  # height * width, row by row; null where there is an error
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("response", pa.string()),  # the answer; null of a caption
        ("turns", pa.list_(turn)),  # what follows of a conversation, null for most
        ("error", pa.string()),
        ("source", pa.string()),  # "train.jsonl:17"
    ])  # fmt: skip


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


def example_of(values):
    """(text, response or None, further turns or None, image) of a row as a user wrote it.

    Values: text, image and perhaps response; or messages, of {role, content}, and images; or LLaVA's conversations, of
    {from, value}, and image. InputError: others.
    """
    image = values.get("image")
    if isinstance(values.get("conversations"), list):
        turns = [turn if isinstance(turn, dict) else {} for turn in values["conversations"]]
        messages = [{"role": ROLES.get(turn.get("from")), "content": turn.get("value")} for turn in turns]
        values = {**values, "messages": messages}
    if "messages" not in values:
        response = values.get("response")
        response = None if response is None else text_of("response", response)
        return text_of("text", values.get("text")), response, None, image
    if "images" in values:
        images = values["images"]
        if not isinstance(images, list) or len(images) != 1:
            raise InputError(f"images must be a list of one image, got {shown(images)}")
        image = images[0]
    messages, texts = values["messages"], []
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise InputError(f"messages must be questions and answers in turn, got {shown(messages)}")
    for i, message in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        if not isinstance(message, dict) or message.get("role") != role:
            raise InputError(f"message {i + 1} must be of role {role}, got {shown(message)}")
        content = message.get("content")
        content = content.replace(MARK, "").strip() if isinstance(content, str) else content
        texts.append(text_of(f"the content of message {i + 1}", content))
    (text, response), *turns = zip(texts[::2], texts[1::2], strict=True)
    return text, response, [{"text": t, "response": r} for t, r in turns] or None, image


def prepare(rows, model, processor, image_area, batch_size=1, threads=1):
    """Encode the images of rows: an iterator over dicts of the columns of `schema`, in the order of the rows.

    Args:
        rows: jobs.inputs.Row. One with which something is wrong comes with an `error` and without codes.
        model: Emu3VisionVQModel. processor: of make_processor.
        batch_size: images of one size that are encoded together.
        threads: that read and scale images beside.
    """

    def read(numbered):
        number, row = numbered
        values = dict.fromkeys(columns)
        values.update(id=row.id, source=row.source, error=row.error)
        if row.error is None:
            try:
                values["text"], values["response"], values["turns"], image = example_of(row.values)
                return number, values, pixels_of(image_of(row, image), processor, image_area)
            except InputError as error:
                values["error"] = str(error)
        values["error"] = printable(values["error"])
        return number, values, None

    columns = schema().names
    read_ahead = ahead(read, enumerate(rows), 2 * batch_size + threads, threads)
    batches = groups(read_ahead, lambda one: None if one[2] is None else one[2].shape, batch_size, WAITING * batch_size)
    return in_order(row for batch in batches for row in _encoded(batch, model))


def _encoded(batch, model):
    import paddle

    if batch[0][2] is not None:
        with paddle.no_grad():
            codes = model.encode(paddle.to_tensor(np.stack([pixels for _, _, pixels in batch]))).numpy()
        for (_, values, _), own in zip(batch, codes.astype(np.int32), strict=True):
            values["height"], values["width"] = own.shape
            values["codes"] = own.ravel()
    return [(number, values) for number, values, _ in batch]
