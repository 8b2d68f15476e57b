# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Images and texts to what training reads: rows of visual codes and texts."""

from paddlemix.jobs.inputs import image_of, text_of
from paddlemix.jobs.workers import Encode, pixels_of
from paddlemix.utils import InputError, shown

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
    if values.get("messages") is None:  # Parquet has null where a row lacks a column
        response = values.get("response")
        response = None if response is None else text_of("response", response)
        return text_of("text", values.get("text")), response, None, image
    if values.get("images") is not None:
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


def prepare(model, processor, image_area, batch_size=1, threads=1):
    """The worker (jobs/workers.py) that encodes the images of rows, to the columns of `schema`.

    Args:
        model: Emu3VisionVQModel. processor: of make_processor.
        batch_size, threads: as Encode takes them.
    """

    def read(row, values):
        values["text"], values["response"], values["turns"], image = example_of(row.values)
        return pixels_of(image_of(row, image), processor, image_area)

    return Encode(model, read, batch_size, threads)
