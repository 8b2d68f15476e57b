# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a job says, on its way to a client: a mailbox between the engine's thread and the event loop, replies in one
piece, and the events of streams. Of each kind of event a mailbox keeps the newest that was not taken, so that a slow
client holds nobody up and no memory."""

import asyncio
import base64
import contextlib
import io
import time
from pathlib import Path

from paddlemix.results import png_info

from . import schema
from .guard import ClientLeft, TooSlow
from .jobs import Done, Failed, Partial, Progress, Queued, Text

KEEP_ALIVE = 15  # seconds between signs of life in a stream, for the proxies between
PROGRESS_EVERY = 0.2


class Mailbox:
    """What an engine says of a job, for the event loop: of each kind the newest that was not taken, texts as one."""

    def __init__(self, job, visit, seconds):
        self.loop, self.ready, self.events, self.visit = asyncio.get_running_loop(), asyncio.Event(), {}, visit
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        job.listen(self._hear)

    def _hear(self, event):  # in the engine's thread
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self._put, event)

    def _put(self, event):
        key = type(event), getattr(event, "index", None)
        before = self.events.get(key)
        if isinstance(event, Text) and before:
            event = Text(before.text + event.text)
        if isinstance(event, (Text, Partial)) or (isinstance(event, Progress) and event.tokens):
            self.visit.first_token()
        self.events[key] = event
        self.ready.set()

    async def take(self, seconds):
        """The events since the last time, after at most so long. Raises what the job has failed with."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.ready.wait(), seconds)
        if time.monotonic() > self.deadline:
            raise TooSlow(f"the request took longer than {self.seconds:g} seconds, this server's limit")
        events, self.events = list(self.events.values()), {}
        self.ready.clear()
        for event in events:
            if isinstance(event, Failed):
                raise event.error
        return events

    async def result(self, request):
        """What the job gives, for a reply in one piece."""
        while True:
            for event in await self.take(0.25):
                if isinstance(event, Done):
                    return event.result
            if await request.is_disconnected():
                raise ClientLeft


def _metadata(text):
    """What belongs into a picture's file; of a folder of this machine the last name."""
    return {k: Path(v).name if k.endswith("_path") and Path(str(v)).exists() else v for k, v in text.items()}


def encoded(picture, format, text=None):
    """A PIL picture as base64 of a file; a PNG holds `text` in its metadata."""
    file = io.BytesIO()
    options = {"pnginfo": png_info(text or {})} if format == "png" else {"quality": 95}
    picture.save(file, format, **options)
    return base64.b64encode(file.getvalue()).decode()


def as_encoded(image_processor, picture):
    """The PNG of a picture in the size in which it is encoded, as base64."""
    [image] = image_processor.postprocess(image_processor(picture)["pixel_values"])["pixel_values"]
    return encoded(image, "png")


def pictures(data, picture, format, **more):
    size = f"{picture.width}x{picture.height}"
    data = [{"b64_json": one} for one in data]
    return {"created": int(time.time()), "data": data, "size": size, "output_format": format or "png", **more}


def image_reply(result, body):
    data = [encoded(picture, body.output_format or "png", _metadata(text)) for picture, text in result.pictures]
    usage = schema.image_usage(result.prompt_tokens, result.tokens)
    picture, text = result.pictures[0]
    return pictures(data, picture, body.output_format, usage=usage, seed=text["seed"])


async def _taken(mailbox, wants_progress):
    """A job's events until it is done, as a stream sends them: progress not too often, and signs of life."""
    last = 0.0
    while True:
        events = await mailbox.take(KEEP_ALIVE)
        if not events:
            yield "keep-alive"
        for event in events:
            if not isinstance(event, (Queued, Progress)):
                yield event
                if isinstance(event, Done):
                    return
            elif wants_progress and (isinstance(event, Queued) or time.monotonic() > last + PROGRESS_EVERY):
                last = time.monotonic()
                yield "emu3.progress", _progress(event)


def _progress(event):
    names = ("tokens", "total", "rows", "rows_total", "tokens_per_s")
    values = {name: getattr(event, name, None) for name in names}
    speed, left = values["tokens_per_s"], None
    if speed:
        left = round((event.total - event.tokens) / speed, 1)
    return {"type": "emu3.progress", "place": getattr(event, "place", 0), **values, "seconds_left": left}


async def image_events(mailbox, body):
    format = body.output_format or "png"
    async for event in _taken(mailbox, body.emu3_progress):
        if isinstance(event, Partial):
            data = await asyncio.to_thread(encoded, event.image, format)
            yield _image_event("partial_image", data, event.image, format, partial_image_index=event.number,
                               index=event.index)  # fmt: skip
        elif isinstance(event, Done):
            result, count = event.result, len(event.result.pictures)
            usage = schema.image_usage(result.prompt_tokens // count, result.tokens // count).model_dump()
            for i, (picture, text) in enumerate(result.pictures):
                data = await asyncio.to_thread(encoded, picture, format, _metadata(text))
                yield _image_event("completed", data, picture, format, usage=usage, index=i, seed=text["seed"])
        else:
            yield event


def _image_event(name, data, picture, format, **more):
    name, size = f"image_generation.{name}", f"{picture.width}x{picture.height}"
    same = {"created_at": int(time.time()), "size": size, "output_format": format, "quality": "auto",
            "background": "opaque"}  # fmt: skip
    return name, {"type": name, "b64_json": data, **same, **more}


async def chat_events(mailbox, body, head):
    head = {**head, "object": "chat.completion.chunk"}
    has_usage = bool(body.stream_options and body.stream_options.include_usage)
    none = {"usage": None} if has_usage else {}

    def chunk(delta, reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return None, {**head, "choices": [choice], **none}

    yield chunk({"role": "assistant", "content": ""})
    async for event in _taken(mailbox, body.emu3_progress):
        if isinstance(event, Text):
            yield chunk({"content": event.text})
        elif isinstance(event, Done):
            result = event.result
            yield chunk({}, result.finish_reason)
            if has_usage:
                usage = schema.chat_usage(result.prompt_tokens, result.tokens, result.cached_tokens).model_dump()
                yield None, {**head, "choices": [], "usage": usage}
            yield None, "[DONE]"
        else:
            yield event
