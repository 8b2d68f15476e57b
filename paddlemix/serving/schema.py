# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Requests and replies of the service: OpenAI's, as its client sends and reads them, and what Emu3 adds to them."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from paddlemix.utils import InputError, shown

Characters = Annotated[str, Field(max_length=100_000)]


class Request(BaseModel):
    """A body that is not what it says is refused; fields that are not known here are left alone, as OpenAI's API has
    ever more of them."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    model: Annotated[str, Field(max_length=200)] | None = None


class Sampled(Request):
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool | None = False
    emu3_progress: bool = False  # events of place, tokens and time in the stream, which OpenAI's client does not know


class ImageRequest(Sampled):
    """Of /v1/images/generations. `seed` to `top_p` and `ratio` are Emu3's own."""

    prompt: Annotated[Characters, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=10)] | None = 1
    size: str | None = "auto"
    ratio: str | None = None
    negative_prompt: Characters | None = None
    guidance_scale: float | None = None
    response_format: Literal["b64_json"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    partial_images: Annotated[int, Field(ge=0, le=1000)] | None = 0  # OpenAI takes 3; a row is the most that is shown
    user: Characters | None = None

    def options(self):
        """The arguments of `generate_steps`. InputError: a size that cannot be."""
        width = height = None
        if self.size not in (None, "auto"):
            match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", self.size, re.ASCII)
            width, height = map(int, match.groups()) if match else (0, 0)
            if not width or not height:
                raise InputError(f"size must be auto or WIDTHxHEIGHT, such as 512x512, got {shown(self.size)}")
        options = self.model_dump(
            include={"negative_prompt", "ratio", "guidance_scale", "temperature", "top_k", "top_p", "seed"}
        )
        return {**options, "height": height, "width": width}


class Url(Request):
    url: str
    detail: str | None = None


class TextPart(Request):
    type: Literal["text"]
    text: Characters


class ImagePart(Request):
    type: Literal["image_url"]
    image_url: Url


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Characters | Annotated[list[Part], Field(fail_fast=True)]  # else a body is an error for each of its parts


class StreamOptions(Request):
    include_usage: bool = False


class ResponseFormat(Request):
    type: Literal["text"]


class ChatRequest(Sampled):
    """Of /v1/chat/completions. An answer is greedy unless temperature, top_p or Emu3's own top_k is given."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    n: Literal[1] | None = 1
    stop: Characters | Annotated[list[Characters], Field(max_length=4, fail_fast=True)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] | None = None
    user: Characters | None = None

    @property
    def stops(self):
        return tuple(s for s in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if s)


class EncodeRequest(Request):
    image: str  # a data: URL
    return_image: bool = False  # as it was encoded: its sides are multiples of 8 then


class DecodeRequest(Request):
    codes: Annotated[list[Annotated[list[int], Field(fail_fast=True)]], Field(min_length=1, fail_fast=True)]
    output_format: Literal["png", "jpeg", "webp"] | None = "png"


class Error(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Of every reply with a status of 400 and above, and of an event `error` in a stream."""

    error: Error


class ImageUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    total_tokens: int


class Picture(BaseModel):
    b64_json: str


class ImageReply(BaseModel):
    created: int
    data: list[Picture]
    size: str
    output_format: str
    usage: ImageUsage | None = None
    seed: int | None = None


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Codes(BaseModel):
    codes: list[list[int]]
    size: str
    model: str
    b64_json: str | None = None


def image_usage(prompt_tokens, tokens):
    details = {"image_tokens": 0, "text_tokens": prompt_tokens}
    return ImageUsage(
        input_tokens=prompt_tokens, input_tokens_details=details, output_tokens=tokens,
        total_tokens=prompt_tokens + tokens,
    )  # fmt: skip


def chat_usage(prompt_tokens, tokens, cached_tokens):
    return ChatUsage(
        prompt_tokens=prompt_tokens, completion_tokens=tokens, total_tokens=prompt_tokens + tokens,
        prompt_tokens_details={"cached_tokens": cached_tokens},
    )  # fmt: skip
