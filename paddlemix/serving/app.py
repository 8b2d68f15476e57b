# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The HTTP side of the service: OpenAI's endpoints, Emu3's own, and a page, over an Engine.

guard.py stands before the endpoints, which make a job of the engine of each request; replies.py makes the reply of what
the engine says of it.
"""

import asyncio
import base64
import hashlib
import json
import logging
import math
import re
import secrets
import time
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from paddlemix.pipelines.steps import LONGEST_ANSWER
from paddlemix.processors.image_processing_emu3 import over_white, picture_of_bytes
from paddlemix.utils import InputError, shown

from . import schema
from .engine import Busy, Unavailable
from .guard import Guard, Limits, Refused, TooSlow, where_it_failed
from .jobs import Chat, Decode, Draw, Encode
from .metrics import Metrics
from .replies import Mailbox, as_encoded, chat_events, encoded, image_events, image_reply, pictures

PAGE = Path(__file__).parent / "page" / "index.html"
DECODERS = 2  # pictures of requests that are decoded at the same time
log = logging.getLogger(__name__)


def make_app(engine, *, names, api_key=None, limits=None, cors_origins=(), hosts=None, allow_image_urls=False):
    """The FastAPI application of an Engine.

    Args:
        engine: Engine; who makes the app starts it and drains it.
        names: {name of a model: what it does, of "draw" and "chat"}; the first of each is taken where none is named.
        api_key: what requests to /v1/ must carry; None asks for none.
        limits: guard.Limits.
        cors_origins: of pages elsewhere that may ask.
        hosts: the names in a request's Host that are taken, beside IP addresses; None takes all.
        allow_image_urls: fetch pictures of http and https URLs in chats.
    """
    limits = limits or Limits()
    service = _Service(engine, names, limits, allow_image_urls)
    app = FastAPI(
        title="Emu3", docs_url=None, redoc_url=None,
        responses={kind: {"model": schema.ErrorReply, "description": "an error"} for kind in ("4XX", "5XX")},
    )  # fmt: skip
    metrics = Metrics(engine)
    app.add_middleware(Guard, limits=limits, api_key=api_key, hosts=hosts, metrics=metrics, failure=failure)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    for kind in (InputError, Busy, Refused, TooSlow, HTTPException, RequestValidationError, MemoryError):
        app.add_exception_handler(kind, lambda request, error: failure(error))

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [service.model(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        service.check_name(name)
        return service.model(name)

    @app.post("/v1/images/generations", response_model=schema.ImageReply)
    async def generations(body: schema.ImageRequest, request: Request):
        name, options = service.name(body.model, "draw"), body.options()
        is_stream = bool(body.stream)
        previews = (body.partial_images or 0) * is_stream
        job = Draw(name, body.prompt, body.n or 1, options, previews, most_pixels=limits.pixels)
        mailbox = await service.start(job, request)
        if is_stream:
            return stream(image_events(mailbox, body))
        result = await mailbox.result(request)
        return await asyncio.to_thread(image_reply, result, body)

    @app.post("/v1/images/edits")
    @app.post("/v1/images/variations")
    async def edits():
        raise Refused(400, "this model draws from text only: ask /v1/images/generations")

    @app.post("/v1/chat/completions", response_model=None)
    async def completions(body: schema.ChatRequest, request: Request):
        name = service.name(body.model, "chat")
        longest = body.max_completion_tokens or body.max_tokens or min(limits.tokens, LONGEST_ANSWER)
        if longest > limits.tokens:
            raise InputError(f"max_tokens is at most {limits.tokens} here, got {longest}")
        turns = await service.turns(body.messages, request)
        seed = secrets.randbits(32) if body.seed is None else body.seed  # greedy answers need none
        options = {"temperature": body.temperature, "top_k": body.top_k, "top_p": body.top_p, "seed": seed}
        job = Chat(name, turns, longest, options, stop=body.stops)
        mailbox = await service.start(job, request)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        if body.stream:
            return stream(chat_events(mailbox, body, head))
        result = await mailbox.result(request)
        message = {"role": "assistant", "content": result.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": result.finish_reason, "logprobs": None}
        usage = schema.chat_usage(result.prompt_tokens, result.tokens, result.cached_tokens)
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}

    @app.post("/v1/emu3/encode", response_model=schema.Codes, response_model_exclude_none=True)
    async def encode(body: schema.EncodeRequest, request: Request):
        name = service.name(body.model)
        picture = await service.picture(body.image, request, "image")
        codes = (await (await service.start(Encode(name, picture), request)).result(request)).tolist()
        factor = engine.pipelines[name].vision_tokenizer.spatial_scale_factor
        size = f"{len(codes[0]) * factor}x{len(codes) * factor}"
        image = None
        if body.return_image:
            image = await asyncio.to_thread(as_encoded, engine.pipelines[name].image_processor, picture)
        return {"codes": codes, "size": size, "model": name, "b64_json": image}

    @app.post("/v1/emu3/decode", response_model=schema.ImageReply, response_model_exclude_none=True)
    async def decode(body: schema.DecodeRequest, request: Request):
        widths = set(map(len, body.codes))
        if len(widths) != 1 or 0 in widths:
            raise InputError("codes must be rows of one length, at least one code each")
        if len(body.codes) * widths.pop() > limits.pixels // 64:  # a code is of 8 x 8 pixels
            raise InputError(f"at most {limits.pixels // 64} codes are decoded here")
        job = Decode(service.name(body.model), body.codes)
        picture = await (await service.start(job, request)).result(request)
        data = await asyncio.to_thread(encoded, picture, body.output_format or "png")
        return pictures([data], picture, body.output_format)

    @app.get("/health")
    async def health():
        is_ready = engine.state == "ready"
        return JSONResponse({"status": engine.state}, 200 if is_ready else 503, {} if is_ready else RETRY)

    @app.get("/metrics")
    async def numbers():
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse)
    async def page():
        return HTMLResponse(html, headers={"content-security-policy": policy})

    html = PAGE.read_text(encoding="utf-8")
    policy = content_security_policy(html)
    return app


def content_security_policy(html):
    """The header of a page that loads nothing from elsewhere, and runs no script and style but its own, by their
    hashes."""
    sources = {}
    for kind in ("script", "style"):
        texts = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", html, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        sources[kind] = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    return (
        f"default-src 'self'; img-src 'self' data: blob:; script-src {sources['script']}; "
        f"style-src {sources['style']}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


# --- errors

RETRY = {"retry-after": "5"}


def failure(error):
    """The reply in OpenAI's form to an exception."""
    status, body, headers = _failure(error)
    return JSONResponse(body, status, headers)


def _failure(error):
    """(status, body, headers)"""
    param = code = None
    kind, headers, message = "invalid_request_error", {}, " ".join(str(error).split())
    if isinstance(error, RequestValidationError):
        status, (param, message) = 400, _mistake(error.errors())
    elif isinstance(error, InputError):
        status = 400
    elif isinstance(error, Busy):
        is_busy = not isinstance(error, Unavailable)
        status, kind = (429, "rate_limit_error") if is_busy else (503, "unavailable_error")
        headers = {"retry-after": str(max(1, math.ceil(error.retry_after or 1)))}
    elif isinstance(error, Refused):
        status, code, headers = error.status, error.code, error.headers
        kind = {401: "authentication_error", 429: "rate_limit_error", 503: "unavailable_error"}.get(status, kind)
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, _http_words(error), dict(error.headers or {})
    elif isinstance(error, TooSlow):
        status, kind = 504, "timeout_error"
    elif isinstance(error, MemoryError):
        status, kind, headers = 503, "unavailable_error", RETRY
        message = "the server is out of memory for this request: ask for fewer or smaller pictures, or later"
    else:  # its words may hold anything
        status, kind, message = 500, "server_error", f"the server failed at this request ({type(error).__name__})"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers


def _mistake(errors):
    """(where, what) of the mistake that pydantic found deepest in a body."""
    worst = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    where = [str(place) for place in worst["loc"] if re.fullmatch(r"\w+", str(place)) and place not in _TAGS]
    where = ".".join(where[1:]) or None
    if worst["type"] == "json_invalid" or where is None:
        return None, "the body must be one JSON object"
    given = "" if worst["type"] == "missing" else f", got {shown(worst['input'])}"
    return where, f"{where}: {worst['msg']}{given}"


_TAGS = ("str", "text_part", "image_part")  # which of several forms pydantic has tried


def _http_words(error):
    words = {
        404: "there is no such endpoint: GET /openapi.json lists them",
        405: f"this endpoint takes {(error.headers or {}).get('Allow', 'another method')}",
    }
    return words.get(error.status_code, "the body cannot be read as JSON")


# --- jobs


class _Service:
    """What the endpoints share."""

    def __init__(self, engine, names, limits, allow_image_urls):
        self.engine, self.names, self.limits, self.allow_image_urls = engine, names, limits, allow_image_urls
        self.created = int(time.time())
        self.decoders = asyncio.Semaphore(DECODERS)

    def model(self, name):
        same = {"object": "model", "created": self.created, "owned_by": "emu3"}
        return {"id": name, **same, "tasks": list(self.names[name])}

    def check_name(self, name):
        if name not in self.names:
            raise Refused(404, f"there is no model {shown(name)}: there are {', '.join(self.names)}", "model_not_found")

    def name(self, asked, task=None):
        """The model that a request is for."""
        if asked is not None:
            self.check_name(asked)
            if task and task not in self.names[asked]:
                raise InputError(f"the model {asked} does not {task}: take another, or leave model out")
            return asked
        able = [name for name, tasks in self.names.items() if task is None or task in tasks]
        if not able:
            raise Refused(404, f"no model of this server does {task}: it was started without one", "model_not_found")
        return able[0]

    async def start(self, job, request):
        """Give the engine a job, which is cancelled when the request ends, however it ends."""
        visit = request.state.visit
        mailbox = Mailbox(job, visit, self.limits.seconds)
        visit.at_end(lambda: self.engine.cancel(job))
        await asyncio.to_thread(self.engine.submit, job)
        return mailbox

    async def turns(self, messages, request):
        """Messages of a chat -> turns of a Chat job."""
        turns, pictures, characters = [], 0, 0
        for i, message in enumerate(messages):
            parts = [message.content] if isinstance(message.content, str) else []
            for k, part in enumerate([] if parts else message.content):
                if part.type == "text":
                    parts.append(part.text)
                    continue
                pictures += 1
                if pictures > self.limits.pictures:
                    raise InputError(f"a chat takes at most {self.limits.pictures} pictures here")
                parts.append(await self.picture(part.image_url.url, request, f"messages.{i}.content.{k}"))
            characters += sum(len(part) for part in parts if isinstance(part, str))
            if characters > self.limits.characters:
                raise InputError(f"a chat takes at most {self.limits.characters} characters here: shorten it")
            turns.append(("system" if message.role == "developer" else message.role, parts))
        return turns

    async def picture(self, url, request, name):
        """The picture of a URL, PIL of mode RGB."""
        visit = request.state.visit
        if match := re.match(r"data:[^,]{0,100};base64,", url[:120], re.IGNORECASE):
            data = url[match.end() :]
        elif re.match(r"https?://", url[:8], re.IGNORECASE) and self.allow_image_urls:
            data = await self._fetched(url, name, visit)
        else:
            taken = "a data: URL of base64" + (", http:// or https://" if self.allow_image_urls else "")
            raise InputError(f"{name}: a picture comes as {taken} here, got {shown(url[:60])}")
        async with self.decoders:
            picture = await asyncio.to_thread(_picture, data, name, self.limits.picture)
        visit.hold(3 * picture.width * picture.height)
        return picture

    async def _fetched(self, url, name, visit):
        import httpx

        async def read():
            async with httpx.AsyncClient(timeout=10) as client, client.stream("GET", url) as reply:
                if reply.status_code != 200:
                    raise InputError(f"{name}: the picture's URL gave status {reply.status_code}")
                data = b""
                async for chunk in reply.aiter_bytes():
                    data += chunk
                    if len(data) > self.limits.body:
                        raise InputError(f"{name}: the picture has more than {self.limits.body} bytes")
                return data

        try:
            data = await asyncio.wait_for(read(), 30)
        except InputError:
            raise
        except Exception as error:  # whatever the libraries make of a client's URL, groups of errors too
            raise InputError(f"{name}: the picture's URL cannot be read ({type(error).__name__})") from None
        visit.hold(len(data))
        return data


def _picture(data, name, most_pixels):
    """Bytes, or their base64 -> a PIL picture of mode RGB"""
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError:
            raise InputError(f"{name}: this is not base64, which a picture comes in") from None
    return over_white(picture_of_bytes(data, name, most_pixels))[0]


# --- streams


def stream(events):
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_sent(events), media_type="text/event-stream", headers=headers)


async def _sent(events):
    """Server-sent events of (name or None, what it holds), or of comments, str."""
    try:
        async for event in events:
            if isinstance(event, str):
                yield f": {event}\n\n"
                continue
            name, data = event
            line = data if data == "[DONE]" else json.dumps(data, separators=(",", ":"))
            yield (f"event: {name}\n" if name else "") + f"data: {line}\n\n"
    except Exception as error:
        status, body, _ = _failure(error)
        if status == 500:
            log.error("a request failed: %s", where_it_failed(error))
        yield f"event: error\ndata: {json.dumps(body)}\n\n"
