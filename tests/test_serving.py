# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The service over real sockets: OpenAI's own client on every endpoint, and clients that do what they must not."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

openai = pytest.importorskip("openai")

from paddlemix.commands.serve import listen, make_server
from paddlemix.pipelines import Emu3Pipeline
from paddlemix.serving.app import content_security_policy, make_app
from paddlemix.serving.engine import Engine
from paddlemix.serving.guard import Limits
from paddlemix.serving.jobs import Draw

ROOT = Path(__file__).resolve().parents[1]
SCENE = ROOT / "paddlemix" / "demo_images" / "emu3_scene.png"
SMALL = {"size": "32x32", "prompt": "a red circle"}
LONG = {"size": "480x480", "prompt": "a red circle"}  # many seconds
NAMES = {"emu3-mini": ["draw", "chat"]}


class Server:
    """uvicorn in a thread."""

    def __init__(self, engine, names=NAMES, **options):
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = make_server(make_app(engine, names=names, **options))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path, body, **headers):
        headers["content-type"] = "application/json"
        return httpx.post(f"{self.url}{path}", content=json.dumps(body), headers=headers, timeout=60)

    def raw(self, text):
        """A socket that has sent what is given."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(text.encode() if isinstance(text, str) else text)
        return connection

    def end(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def pipeline():
    return Emu3Pipeline.from_pretrained("emu3-mini", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def engine(pipeline):
    """Two rows: a guided picture fills it."""
    engine = Engine({"emu3-mini": pipeline}, max_batch=2, max_queue=2)
    engine.start()
    wait_for(lambda: engine.state == "ready")
    yield engine
    engine.drain(1)


@pytest.fixture(scope="module")
def server(engine):
    server = Server(engine, limits=Limits(tokens=64, pictures=3, characters=10_000, body=1 << 20, picture=10**6))
    yield server
    server.end()


@pytest.fixture
def serve():
    """serve(engine, **options) -> a Server of this test."""
    servers = []
    yield lambda engine, **options: servers.append(Server(engine, **options)) or servers[-1]
    for server in servers:
        server.end()


@pytest.fixture
def client(server):
    return server.client()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def idle(engine):
    return not engine.stats()["running"] and not engine.stats()["queue_depth"]


def data_url(picture=SCENE):
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def picture_of(b64_json):
    image = Image.open(io.BytesIO(base64.b64decode(b64_json)))
    image.load()
    return image


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a.convert("RGB")), np.asarray(b.convert("RGB")))


def asks(*parts, role="user"):
    """A message of texts and pictures' URLs."""
    content = [{"type": "image_url", "image_url": {"url": p}} if p.startswith(("data:", "http")) else
               {"type": "text", "text": p} for p in parts]  # fmt: skip
    return {"role": role, "content": content}


# --- every endpoint, with OpenAI's client


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("emu3-mini", "model", "emu3") and model.created > 10**9
    assert client.models.retrieve("emu3-mini").id == "emu3-mini"
    with pytest.raises(openai.NotFoundError, match="no model 'BAAI/Emu3-Gen': there are emu3-mini"):
        client.models.retrieve("BAAI/Emu3-Gen")


def test_pictures_are_those_of_the_pipeline(client, pipeline):
    """With every value that there is; a PNG holds what draws it again."""
    extra = {"seed": 5, "negative_prompt": "blue", "guidance_scale": 1.5, "ratio": "2:1", "temperature": 0.5,
             "top_k": 100, "top_p": 0.9}  # fmt: skip
    reply = client.images.generate(
        model="emu3-mini", n=2, response_format="b64_json", user="someone", quality="high", **SMALL, extra_body=extra
    )  # fmt: skip
    expected = pipeline.generate(SMALL["prompt"], num_images=2, height=32, width=32, **extra)
    pictures = [picture_of(one.b64_json) for one in reply.data]
    for picture, other in zip(pictures, expected, strict=True):
        same(picture, other)
    assert pictures[1].format == "PNG" and pictures[1].text["prompt"] == "a red circle"
    assert pictures[1].text.items() >= {"seed": "5", "image": "1", "images": "2", "top_k": "100", "ratio": "2:1",
                                        "negative_prompt": "blue", "model_path": "emu3-mini"}.items()  # fmt: skip
    assert reply.created > 10**9 and (reply.size, reply.output_format) == ("48x24", "png") == (
        f"{expected[0].width}x{expected[0].height}", "png"
    )  # fmt: skip
    usage = reply.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens and usage.output_tokens > 2 * 18
    assert usage.input_tokens_details.text_tokens == usage.input_tokens > 0


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_formats_of_pictures(client, format):
    reply = client.images.generate(output_format=format, **SMALL)
    assert picture_of(reply.data[0].b64_json).format == format.upper() and reply.output_format == format


def test_without_a_seed_each_picture_has_its_own(client):
    seeds = {client.images.generate(size="16x16", prompt="x").seed for _ in range(2)}
    assert len(seeds) == 2


def test_size_auto_is_the_checkpoints(client):
    assert client.images.generate(size="auto", prompt="x").size == "64x64" == client.images.generate(prompt="x").size


def test_a_picture_that_is_streamed(client, pipeline):
    stream = client.images.generate(
        **SMALL, n=1, stream=True, partial_images=3, extra_body={"seed": 1, "guidance_scale": 1.5}
    )
    events = list(stream)
    *partial, done = events
    assert {e.type for e in partial} == {"image_generation.partial_image"} or not partial
    numbers = [e.partial_image_index for e in partial]
    assert numbers == sorted(set(numbers)) and len(numbers) <= 3
    assert all(picture_of(e.b64_json).size == (32, 32) for e in partial)
    assert done.type == "image_generation.completed" and (done.size, done.output_format) == ("32x32", "png")
    same(picture_of(done.b64_json), pipeline.generate("a red circle", height=32, width=32, seed=1,
                                                      guidance_scale=1.5)[0])  # fmt: skip
    assert done.usage.output_tokens == 4 * 5 + 3 and done.usage.total_tokens > done.usage.output_tokens


def events_of(server, path, body):
    """(name, data) of a stream's events, as they are sent."""
    with httpx.stream("POST", f"{server.url}{path}", json={**body, "stream": True}, timeout=60) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(reply.iter_text()).split("\n\n")
    for block in filter(None, blocks):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        if "data" in fields:
            yield fields.get("event"), fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"])


def test_progress_for_those_who_ask(server):
    events = list(events_of(server, "/v1/images/generations", {"prompt": "x", "n": 2, "emu3_progress": True}))
    progress = [data for name, data in events if name == "emu3.progress"]
    assert progress and [name for name, _ in events][-2:] == ["image_generation.completed"] * 2
    assert events[-1][1]["index"] == 1
    running = [p for p in progress if p["place"] == 0]
    assert all(0 <= p["tokens"] <= p["total"] == 2 * 75 and p["rows"] <= p["rows_total"] == 16 for p in running)
    assert all(p["seconds_left"] >= 0 for p in running if p["tokens_per_s"])
    assert "emu3.progress" not in dict(events_of(server, "/v1/images/generations", {"prompt": "x"}))


def test_answers_are_those_of_the_pipeline(client, pipeline):
    image = Image.open(SCENE)
    for question in ("Please describe the image", "背景是什么颜色？"):
        reply = client.chat.completions.create(model="emu3-mini", messages=[asks(data_url(), question)])
        assert reply.choices[0].message.content == pipeline.understand(image, question)
        assert (reply.choices[0].finish_reason, reply.choices[0].message.role) == ("stop", "assistant")
        usage = reply.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > usage.prompt_tokens > 50
        assert 0 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    sampled = {"temperature": 2.0, "top_p": 0.9, "seed": 3}
    reply = client.chat.completions.create(model="emu3-mini", messages=[asks(question, data_url())], **sampled)
    assert reply.choices[0].message.content == pipeline.understand(image, question, **sampled)


def test_an_answer_that_is_streamed(client):
    question = {"model": "emu3-mini", "messages": [asks(data_url(), "Please describe the image")]}
    whole = client.chat.completions.create(**question).choices[0].message.content
    chunks = list(client.chat.completions.create(**question, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}
    *chunks, last = client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True})
    assert not last.choices and last.usage.completion_tokens > 5 and all(c.usage is None for c in chunks)


def test_where_an_answer_ends(client):
    question = {"model": "emu3-mini", "messages": [asks(data_url(), "Please describe the image")]}
    whole = client.chat.completions.create(**question).choices[0].message.content
    word = whole.split()[2]
    for stop in (word, [word, "never"]):
        [choice] = client.chat.completions.create(**question, stop=stop).choices
        assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(word)], "stop")
        chunks = client.chat.completions.create(**question, stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole[: whole.index(word)]
    for name in ("max_tokens", "max_completion_tokens"):
        reply = client.chat.completions.create(**question, **{name: 2})
        assert whole.startswith(reply.choices[0].message.content)
        assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 2)


def test_conversations(client, pipeline):
    """Several turns, a system's text and two pictures: the answer is that of the prompt the processor makes."""
    from paddlemix.models.emu3 import generate_text

    messages = [
        {"role": "system", "content": "Be brief."}, asks(data_url(), "What colour is the triangle?"),
        {"role": "assistant", "content": "blue"}, asks("How many objects are there?", data_url()),
    ]  # fmt: skip
    reply = client.chat.completions.create(model="emu3-mini", messages=messages, max_tokens=8)
    image, processor = Image.open(SCENE).convert("RGB"), pipeline.processor
    size = processor.question_size(image.height, image.width)
    [codes] = processor.tokenize_image([image], sizes=[size])
    prompt = processor.chat_prompt([
        ("system", ["Be brief."]), ("user", [codes, "What colour is the triangle?"]), ("assistant", ["blue"]),
        ("user", ["How many objects are there?", codes]),
    ])  # fmt: skip
    ids = [step[0] for step in generate_text(pipeline.model, [prompt], 8) if step[0] is not None]
    assert reply.choices[0].message.content == processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert reply.usage.prompt_tokens == len(prompt)
    text = client.chat.completions.create(model="emu3-mini", messages=[{"role": "user", "content": "Hello"}])
    assert text.choices[0].finish_reason in ("stop", "length")


def test_the_vision_tokenizer(server, pipeline):
    reply = server.post("/v1/emu3/encode", {"image": data_url()}).json()
    [step] = pipeline.autoencode_steps(Image.open(SCENE))
    assert reply["codes"] == step.codes.tolist() and reply["size"] == f"{step.image.width}x{step.image.height}"
    assert set(reply) == {"codes", "size", "model"}
    reply = server.post("/v1/emu3/encode", {"image": data_url(), "return_image": True}).json()
    same(picture_of(reply["b64_json"]), step.original)
    again = server.post("/v1/emu3/decode", {"codes": reply["codes"]}).json()
    same(picture_of(again["data"][0]["b64_json"]), step.image)
    assert again["size"] == reply["size"]


def test_edits_are_refused_in_words(client):
    with pytest.raises(openai.BadRequestError, match="this model draws from text only"):
        client.images.edit(image=SCENE.read_bytes(), prompt="x")


def test_health_and_metrics(server, client):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ready"}
    client.images.generate(size="16x16", prompt="x")
    httpx.get(f"{server.url}/nowhere/{'x' * 100}")
    text = httpx.get(f"{server.url}/metrics").text
    for name in ("emu3_queue_depth", "emu3_running", "emu3_batch_rows", "emu3_tokens_total"):
        assert re.search(rf"^{name} \d", text, re.MULTILINE), name
    assert re.search(r'emu3_requests_total{endpoint="/v1/images/generations",status="200"} \d', text)
    assert 'endpoint="other",status="404"' in text and "xxx" not in text
    for name in ("emu3_request_seconds", "emu3_time_to_first_token_seconds"):
        assert re.search(rf'{name}_count{{endpoint="/v1/images/generations"}} \d', text)


def test_the_page_loads_nothing_from_elsewhere(server):
    reply = httpx.get(server.url)
    assert reply.headers["content-type"].startswith("text/html") and "Emu3" in reply.text
    policy = reply.headers["content-security-policy"]
    assert policy == content_security_policy(reply.text) and "default-src 'self'" in policy
    assert re.fullmatch(r".*script-src '(sha256-[\w+/=]+)'; style-src 'sha256-[\w+/=]+';.*", policy)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", reply.text)


# --- mistakes


def failed(reply, status, *words):
    error = reply.json()["error"]
    assert reply.status_code == status and set(error) == {"message", "type", "param", "code"}, reply.text
    assert all(word in error["message"] for word in words) and "\n" not in error["message"], error
    assert len(error["message"]) < 400
    return error


IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"
SAYS = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (IMAGES, {}, "prompt", "required"), (IMAGES, {"prompt": ""}, "prompt", "at least 1"),
        (IMAGES, {"prompt": 1}, "prompt", "string, got 1"), (IMAGES, {"prompt": "x" * 100_001}, "prompt", "100000"),
        (IMAGES, {"prompt": "a\ud800b"}, "prompt", "unicode"),
        (IMAGES, {"prompt": "x", "n": 11}, "n", "10, got 11"), (IMAGES, {"prompt": "x", "n": 1.5}, "n", "1.5"),
        (IMAGES, {"prompt": "x", "n": True}, "n", "True"), (IMAGES, {"prompt": "x", "n": "2"}, "n", "'2'"),
        (IMAGES, {"prompt": "x", "size": "big"}, None, "WIDTHxHEIGHT, such as 512x512, got 'big'"),
        (IMAGES, {"prompt": "x", "size": "0x8"}, None, "got '0x8'"),
        (IMAGES, {"prompt": "x", "size": "99999x99999"}, None, "100000 x 100000 pixels, at most 1048576"),
        (IMAGES, {"prompt": "x", "ratio": "round"}, None, "width:height"),
        (IMAGES, {"prompt": "x", "temperature": 0}, None, "temperature must be"),
        (IMAGES, {"prompt": "x", "top_k": -1}, None, "top_k must be"),
        (IMAGES, {"prompt": "x", "guidance_scale": 1e300}, None, "guidance_scale must be"),
        (IMAGES, {"prompt": "x", "seed": -1}, "seed", "0, got -1"),
        (IMAGES, {"prompt": "x", "seed": 2**63}, "seed", "got 9223372036854775808"),
        (IMAGES, {"prompt": "x", "response_format": "url"}, "response_format", "b64_json"),
        (IMAGES, {"prompt": "x", "output_format": "gif"}, "output_format", "png"),
        (IMAGES, {"prompt": "x", "partial_images": 1001}, "partial_images", "1000, got 1001"),
        (IMAGES, {"prompt": "x", "stream": "yes"}, "stream", "boolean"), (IMAGES, [1], None, "one JSON object"),
        (CHAT, {"messages": []}, "messages", "at least 1"), (CHAT, {**SAYS, "n": 2}, "n", "got 2"),
        (CHAT, {**SAYS, "max_tokens": 65}, None, "at most 64 here, got 65"),
        (CHAT, {**SAYS, "max_tokens": 0}, "max_tokens", "got 0"),
        (CHAT, {**SAYS, "temperature": 3}, "temperature", "got 3"), (CHAT, {**SAYS, "stop": ["a"] * 5}, "stop", "4"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user' or 'assistant'"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0", "'audio'"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content", "None"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, None, "from user to user"),
        (CHAT, {"messages": [asks("x", role="system"), *SAYS["messages"], asks("x", role="system")]}, None, "system"),
        (CHAT, {"messages": [asks(data_url(), role="system"), *SAYS["messages"]]}, None, "of system"),
        (CHAT, {"messages": [asks("x" * 10_001)]}, None, "at most 10000 characters"),
        (CHAT, {"messages": [asks(*[data_url()] * 4)]}, None, "at most 3 pictures"),
        (CHAT, {"messages": [asks("http://127.0.0.1:1/x.png")]}, None, "a data: URL of base64 here, got 'http:"),
        (CHAT, {"messages": [asks("data:image/png;base64,@@@")]}, None, "messages.0.content.0: this is not base64"),
        (CHAT, {"messages": [asks("data:image/png;base64,AAAA")]}, None, "not a picture that Pillow can read"),
        (CHAT, {**SAYS, "response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        ("/v1/emu3/encode", {"image": "file:///etc/passwd"}, None, "a data: URL"),
        ("/v1/emu3/decode", {"codes": []}, "codes", "at least 1"),
        ("/v1/emu3/decode", {"codes": [[1], [1, 2]]}, None, "rows of one length"),
        ("/v1/emu3/decode", {"codes": [[-1]]}, None, "whole numbers"),
        ("/v1/emu3/decode", {"codes": [[10**6]]}, None, "codes"),
        ("/v1/emu3/decode", {"codes": [[1] * 20_000]}, None, "at most 16384 codes"),
        ("/v1/images/edits", {}, None, "from text only"),
    ],
    ids=lambda value: value[-20:] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_mistake_is_a_line_with_its_place(server, path, body, param, words):
    assert failed(server.post(path, body), 400, words)["param"] == param


def test_a_model_that_only_draws(engine, serve):
    server = serve(engine, names={"emu3-mini": ["draw"]})
    assert failed(server.post(CHAT, SAYS), 404, "no model of this server does chat")["code"] == "model_not_found"
    failed(server.post(CHAT, {**SAYS, "model": "emu3-mini"}), 400, "emu3-mini does not chat")


def test_mistakes_of_http(server):
    def ask(method, path, **options):
        return httpx.request(method, f"{server.url}{path}", **options)

    json_type = {"content-type": "application/json"}
    failed(ask("GET", "/v1/nothing"), 404, "no such endpoint")
    reply = ask("GET", IMAGES)
    failed(reply, 405, "takes POST")
    assert reply.headers["allow"] == "POST"
    failed(ask("DELETE", "/"), 405)
    failed(ask("POST", IMAGES, content=b"{"), 415, "Content-Type: application/json")
    failed(ask("POST", IMAGES, content=b"{", headers=json_type), 400, "JSON")
    failed(ask("POST", IMAGES, content=b"", headers=json_type), 400, "JSON")
    failed(ask("POST", IMAGES, content=b"\xff\xfe", headers=json_type), 400, "JSON")
    failed(ask("POST", IMAGES, content=b"[" * 200_000, headers=json_type), 400, "JSON")
    failed(ask("POST", IMAGES, content=b'{"prompt":"x","n":' + b"9" * 5000 + b"}", headers=json_type), 400)
    failed(ask("POST", IMAGES, content=b'{"prompt":"x","top_p":NaN}', headers=json_type), 400, "top_p")
    failed(server.post(IMAGES, {"prompt": "x", "model": "other"}), 404, "no model 'other'")
    failed(server.post(IMAGES, {"prompt": "x", "user": "x" * (2 << 20)}), 413, "1048576 bytes")
    reply = ask("OPTIONS", IMAGES, headers={"origin": "http://x", "access-control-request-method": "POST"})
    assert reply.status_code == 405 and "access-control-allow-origin" not in reply.headers
    reply = ask("GET", "/v1/models")
    assert re.fullmatch(r"[0-9a-f]{16}", reply.headers["x-request-id"]) and "server" not in reply.headers
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_a_picture_bomb(server):
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    reply = server.post(CHAT, {"messages": [asks(data_url(file.getvalue()))]})
    failed(reply, 400, "messages.0.content.0: ")


@pytest.mark.parametrize("kind", ["chunked", "length"])
def test_a_body_without_end(server, kind):
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n" if kind == "chunked" else f"Content-Length: {1 << 40}\r\n\r\n"
    with server.raw(head) as connection:
        try:
            for _ in range(200):
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n" if kind == "chunked" else b" " * 65536)
        except OSError:
            pass
        else:
            pytest.fail("it took 13 MB")
    failed(server.post(IMAGES, {"prompt": "x", "n": 0}), 400)  # the server goes on


def test_a_body_that_does_not_come(engine, serve):
    server = serve(engine, limits=Limits(body_seconds=0.3))
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with server.raw(head + "{") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "head", ["GET / HTTP/1.1\r\nHost: x\r\nA: " + "a" * 900_000 + "\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", "\x00\r\n\r\n",
             "GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"],
    ids=["long", "no host", "rubbish", "two hosts"],
)  # fmt: skip
def test_headers_that_are_none(server, head):
    with server.raw(head) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_names_of_a_server_of_this_machine(engine, serve):
    """A page elsewhere can let its own name lead to 127.0.0.1, and would be read from then."""
    server = serve(engine, hosts={"localhost", "box.lan"})
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:80", "box.lan"):
        assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil", "[", "127.0.0.1.evil"):
        failed(httpx.get(f"{server.url}/v1/models", headers={"host": host}), 421, "--allowed_host")


def test_pages_elsewhere_that_may_ask(engine, serve):
    server = serve(engine, api_key="k", cors_origins=["https://page.example"])
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    reply = httpx.options(f"{server.url}{IMAGES}", headers={"origin": "https://page.example", **asked})
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "https://page.example"
    reply = httpx.options(f"{server.url}{IMAGES}", headers={"origin": "https://other.example", **asked})
    assert "access-control-allow-origin" not in reply.headers


def test_keys(engine, serve):
    server = serve(engine, api_key="s\u00e9cret")
    assert server.client().api_key == "none"
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "s\u00e9cret".encode()},
                    {"authorization": b"Bearer"}, {"authorization": "Bearer s\u00e9cretly".encode()}):  # fmt: skip
        reply = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert failed(reply, 401, "Authorization: Bearer KEY")["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    good = {"authorization": "Bearer s\u00e9cret".encode()}
    assert httpx.get(f"{server.url}/v1/models", headers=good).status_code == 200
    assert {httpx.get(f"{server.url}{path}").status_code for path in ("/", "/health", "/metrics")} == {200}
    with pytest.raises(openai.AuthenticationError):
        server.client("other").models.list()


def test_the_bound_on_tokens_holds_where_none_is_asked_for(engine, serve):
    server = serve(engine, limits=Limits(tokens=3))
    reply = server.post(CHAT, {"messages": [{"role": "user", "content": "Please describe the image"}]}).json()
    assert reply["usage"]["completion_tokens"] <= 3


def test_a_body_of_very_many_values(engine, serve):
    """What would take minutes to check is refused by the number of its commas and brackets, and a mistake is one."""
    server, start = serve(engine), time.monotonic()
    for more in ({"codes": [["a"] * 1000] * 1000}, {"codes": [[1]], "unknown": [[]] * 1_000_000}):
        failed(server.post("/v1/emu3/decode", more), 413, "values")
    failed(server.post("/v1/emu3/decode", {"codes": [["a"] * 400] * 1000}), 400, "codes")
    assert time.monotonic() - start < 5


def test_the_bound_on_pixels_is_of_what_would_be_drawn(engine, serve):
    """By size, by ratio, and by what the checkpoint draws by itself."""
    server = serve(engine, limits=Limits(pixels=4096))
    assert server.post(IMAGES, SMALL).status_code == 200
    for body in ({"size": "72x64"}, {"ratio": "16:9"}, {"ratio": "100:1"}):
        reply = server.post(IMAGES, {"prompt": "a ring", **body})
        assert reply.status_code == 400 and "at most 4096 are drawn here" in reply.json()["error"]["message"]


def test_a_picture_by_its_url(engine, serve):
    """Where it is allowed, and no more of it than of a body."""
    server = serve(engine, allow_image_urls=True, limits=Limits(body=100_000, tokens=4))
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
    bodies = [SCENE.read_bytes(), b"x" * 200_000]

    def answer():
        for body in bodies:
            connection, _ = listener.accept()
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            connection.close()

    threading.Thread(target=answer, daemon=True).start()
    asked = {"messages": [asks(url, "What colour is the triangle?")], "max_tokens": 4}
    assert server.post(CHAT, asked).json()["choices"][0]["message"]["content"] == "blue"
    failed(server.post(CHAT, asked), 400, "more than 100000 bytes")
    listener.close()
    failed(server.post(CHAT, asked), 400, "cannot be read")
    for wrong in ("http://[/", "http://127.0.0.1:99999/"):
        failed(server.post(CHAT, {"messages": [asks(wrong, "x")]}), 400, "cannot be read")
    failed(server.post(CHAT, {"messages": [asks("data:,x")]}), 400, "base64, http:// or https://")


# --- what goes wrong


def test_a_request_that_fails_inside_fails_alone(server, monkeypatch, caplog):
    def broken(self, *args):
        raise RuntimeError(self.prompt)

    monkeypatch.setattr(Draw, "_prepare", broken)
    error = failed(server.post(IMAGES, {"prompt": "hidden"}), 500, "RuntimeError")
    assert error["type"] == "server_error" and "hidden" not in str(error)
    [(name, data)] = events_of(server, IMAGES, {"prompt": "hidden"})
    assert name == "error" and data["error"]["type"] == "server_error"
    with pytest.raises(openai.APIError, match="RuntimeError"):
        list(server.client().images.generate(prompt="hidden", stream=True))
    assert server.post(CHAT, SAYS).status_code == 200
    assert "RuntimeError" in caplog.text and "hidden" not in caplog.text


def test_a_mistake_that_only_the_engine_sees(server, client):
    """Too many tokens for the model's positions."""
    failed(server.post(CHAT, {"messages": [asks("what? " * 1500)]}), 400, "positions")
    with pytest.raises(openai.APIError, match="positions"):
        list(client.chat.completions.create(model="emu3-mini", messages=[asks("what? " * 1500)], stream=True))


@pytest.mark.parametrize("body", [{}, {"stream": True}], ids=["whole", "streamed"])
def test_a_client_that_leaves_stops_its_work(server, engine, body):
    body = json.dumps({**LONG, **body})
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.raw(head + body):
        wait_for(lambda: engine.stats()["running"] == 1)
    wait_for(lambda: idle(engine), 5)
    wait_for(lambda: 'status="499"' in httpx.get(f"{server.url}/metrics").text or body.endswith("true}"), 5)


def test_a_slow_client_holds_nobody_up(server, engine):
    """It never reads; what it was sent is bounded by its socket."""
    body = json.dumps({**SMALL, "n": 2, "stream": True, "partial_images": 3})
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.raw(head + body):
        assert server.post(IMAGES, {**SMALL, "seed": 1}).status_code == 200
        wait_for(lambda: idle(engine))


def test_a_client_that_takes_nothing_is_let_go(engine, serve, monkeypatch):
    monkeypatch.setattr("paddlemix.serving.replies.encoded", lambda *args: "x" * 20_000_000)
    server = serve(engine, limits=Limits(send_seconds=0.3))
    body = json.dumps({"prompt": "x", "size": "16x16", "n": 2, "stream": True})
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.raw(head + body):
        wait_for(lambda: 'endpoint="/v1/images/generations"' in httpx.get(f"{server.url}/metrics").text, 10)


def test_a_full_queue(server, engine):
    client, streams = server.client(), []
    try:
        for _ in range(3):  # one that runs and two that wait
            streams.append(client.images.generate(**LONG, stream=True))
            wait_for(lambda: engine.stats()["running"] == 1)
        with pytest.raises(openai.RateLimitError, match="2 requests wait") as refusal:
            client.images.generate(**SMALL)
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        [progress] = [line for line in first_lines(server, engine, streams) if '"place":' in line]
        assert json.loads(progress[6:])["place"] == 2
        assert httpx.get(f"{server.url}/health").status_code == 200  # the loop is free
    finally:
        for stream in streams:
            stream.close()
    wait_for(lambda: idle(engine), 5)


def first_lines(server, engine, streams):
    """Of a request that waits in the place of the last one."""
    streams.pop().close()
    wait_for(lambda: engine.stats()["queue_depth"] == 1, 5)
    body = {**LONG, "stream": True, "emu3_progress": True}
    with httpx.stream("POST", f"{server.url}{IMAGES}", json=body, timeout=30) as reply:
        lines = reply.iter_lines()
        return [next(lines), next(lines)]


def test_a_request_has_its_time(engine, serve):
    server = serve(engine, limits=Limits(seconds=0.3))
    failed(server.post(IMAGES, LONG), 504, "longer than 0.3 seconds")
    wait_for(lambda: idle(engine), 5)


def test_too_many_at_once(engine, serve):
    server = serve(engine, limits=Limits(requests=1))
    stream = server.client().images.generate(**LONG, stream=True)
    reply = httpx.get(f"{server.url}/v1/models")
    failed(reply, 503, "at most 1 requests")
    assert reply.headers["retry-after"] == "5"
    stream.close()
    wait_for(lambda: idle(engine), 5)
    wait_for(lambda: httpx.get(f"{server.url}/v1/models").status_code == 200, 5)


def test_pictures_together_are_bounded(engine, serve):
    server = serve(engine, limits=Limits(held=100_000))
    file = io.BytesIO()
    Image.new("RGB", (200, 200)).save(file, "PNG")
    failed(server.post(CHAT, {"messages": [asks(data_url(file.getvalue()))]}), 503, "as many pictures as it can")
    assert server.post(IMAGES, {**SMALL, "user": "x" * 90_000}).status_code == 200  # it was given back


def test_loading_and_draining(pipeline, serve):
    engine = Engine({"emu3-mini": pipeline})
    server = serve(engine)
    with pytest.raises(openai.InternalServerError, match="loaded") as refusal:
        server.client().images.generate(**SMALL)
    assert refusal.value.status_code == 503 and int(refusal.value.response.headers["retry-after"]) >= 1
    reply = httpx.get(f"{server.url}/health")
    assert (reply.status_code, reply.json()["status"]) == (503, "loading") and "retry-after" in reply.headers
    engine.start()
    wait_for(lambda: engine.state == "ready")
    replies = []
    thread = threading.Thread(target=lambda: replies.append(server.post(IMAGES, LONG)))
    thread.start()
    wait_for(lambda: engine.stats()["running"] == 1)
    drain = threading.Thread(target=engine.drain, args=(0.5,))
    drain.start()
    wait_for(lambda: engine.state == "draining")
    failed(server.post(IMAGES, SMALL), 503, "stopping")
    thread.join()
    drain.join()
    failed(replies[0], 503, "stopping")


# --- whatever the schema allows


def test_nothing_that_the_schema_allows_is_a_500(engine, serve, monkeypatch):
    """Nor anything that it does not allow; by schemathesis, a bounded number of requests."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    check_all = Draw.check

    def check_and_shrink(job, pipeline):  # for time: what is drawn is small
        check_all(job, pipeline)
        job.n, job.options = 1, {**job.options, "height": 16, "width": 16}

    monkeypatch.setattr(Draw, "check", check_and_shrink)
    server = serve(engine, limits=Limits(pixels=4096, tokens=2, pictures=2, characters=100))
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            cases = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=8, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(cases)
            def check(case):
                reply = case.call()
                seen.add(reply.status_code)
                assert reply.status_code < 500, reply.text
                if reply.status_code >= 400:
                    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

            with contextlib.suppress(Unsatisfiable):  # there is nothing in it that could be wrong
                check()
    assert {200, 400} <= seen


# --- the command


def start(*arguments, **environment):
    command = [sys.executable, "-m", "paddlemix.commands", "serve", "--model_path=emu3-mini", "--port=0", *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    line = process.stdout.readline()
    assert line.startswith("listening on http://127.0.0.1:"), process.communicate()
    return process, line.split()[-1]


def test_the_command(tmp_path):
    """A key of the environment; SIGTERM lets what runs be finished; no prompt and no key on its streams."""
    process, url = start(f"--output_dir={tmp_path}", "--dtype=float32", EMU3_API_KEY="secret")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    stream = client.images.generate(prompt="hidden words", size="64x64", stream=True, extra_body={"seed": 1})
    process.send_signal(signal.SIGTERM)
    [done] = [event for event in stream if event.type == "image_generation.completed"]
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "", err
    assert err.startswith("finishing what runs, for at most 30 seconds") and not re.search("hidden|secret", err)
    same(Image.open(tmp_path / "result_0.png"), picture_of(done.b64_json))


def test_a_second_ctrl_c_ends_at_once():
    process, url = start()
    stream = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0).images.generate(**LONG, stream=True)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("finishing")
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    stream.close()


def test_what_the_command_refuses(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(*arguments):
        code, out, err = command("serve", *arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: "), (code, out, err)
        return err

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in refused("--model_path=emu3-mini", f"--port={port}")
    assert "give --model_path, --chat_model_path or both" in refused()
    assert "no checkpoint at 'nowhere'" in refused("--model_path=nowhere", "--port=0")
    assert "--port must be 0 to 65535, got 99999" in refused("--model_path=emu3-mini", "--port=99999")
    assert "--max_batch must be 1 to 1e12, got 0" in refused("--model_path=emu3-mini", "--max_batch=0")
    assert "--api_key is empty" in refused("--model_path=emu3-mini", "--api_key=")
    assert "give another --host" in refused("--model_path=emu3-mini", "--host=no.such.host.invalid")


def test_which_model_does_what(tmp_path, monkeypatch):
    """One that does both is there once; a folder is called by its last name."""
    import shutil

    from paddlemix.commands import serve
    from paddlemix.models.emu3.hub import MINI_DIRECTORY

    shutil.copytree(MINI_DIRECTORY / "language_model", tmp_path / "mine")

    def made(*arguments):
        return serve.make_pipelines(serve.parser().parse_args(arguments))

    pipelines, names = made("--model_path=emu3-mini")
    assert names == {"emu3-mini": ["draw", "chat"]} and list(pipelines) == ["emu3-mini"]
    pipelines, names = made("--model_path=emu3-mini", f"--chat_model_path={tmp_path / 'mine'}")
    assert names == {"emu3-mini": ["draw"], "mine": ["chat"]} and len(pipelines) == 2
    pipelines, names = made(f"--model_path={tmp_path / 'mine'}/", f"--chat_model_path={tmp_path / 'mine'}/")
    assert names == {"mine": ["draw", "chat"]} and len(pipelines) == 1
    assert made("--chat_model_path=emu3-mini")[1] == {"emu3-mini": ["chat"]}

