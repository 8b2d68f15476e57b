# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What stands before the endpoints: keys, limits of what a request may hold and how long, and what must end with it.

It is plain ASGI, so that a body without end is left while it comes, and a job is let go when its client is gone.
"""

import asyncio
import hmac
import ipaddress
import logging
import secrets
import time
from dataclasses import dataclass

CONTENT_HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store"),
]  # fmt: skip
UPLOADS = ("/v1/images/edits", "/v1/images/variations")  # which come as forms, and are refused in words
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Of what requests may ask for; the engine has its own of the queue and the batch."""

    body: int = 32 << 20  # bytes of a request's body
    held: int = 1 << 30  # bytes of all requests' bodies and pictures together
    requests: int = 256  # at the same time
    values: int = 500_000  # in a body: commas and brackets
    body_seconds: float = 60  # for a body to come
    send_seconds: float = 60  # for a client to take what is sent
    seconds: float = 3600  # for a job
    characters: int = 200_000  # of a chat
    pictures: int = 16  # of a chat
    picture: int = 50_000_000  # pixels of a picture that is sent
    pixels: int = 1 << 20  # of a picture that is drawn
    tokens: int = 4096  # of an answer


class Refused(Exception):
    """A request that is not taken, with the status of its reply."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class TooSlow(Exception):
    """A job that has taken all the time that one may."""


class ClientLeft(Exception):
    """Nobody waits for a reply any more."""


class Visit:
    """A request from its start to its end: what it holds of the memory, and what is done when it ends."""

    def __init__(self, guard):
        self.guard, self.started = guard, time.monotonic()
        self.held, self.last, self.to_first_token = 0, [], None

    def hold(self, size):
        """Count memory as this request's. Refused: there is too much in all."""
        if self.guard.held + size > self.guard.limits.held:
            raise Refused(503, "the server holds as many pictures as it can: try again", retry_after="5")
        self.guard.held += size
        self.held += size

    def at_end(self, function):
        self.last.append(function)

    def first_token(self):
        if self.to_first_token is None:
            self.to_first_token = time.monotonic() - self.started

    def end(self):
        self.guard.held -= self.held
        for function in self.last:
            function()


class Guard:
    """ASGI middleware; see the module's docstring. `failure` makes a reply, an ASGI application, of an exception."""

    def __init__(self, app, *, limits, metrics, failure, api_key=None, hosts=None):
        self.app, self.limits, self.metrics, self.failure = app, limits, metrics, failure
        self.key = api_key and api_key.encode()
        self.hosts, self.held, self.requests = hosts, 0, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        visit, status = Visit(self), 499  # where the client leaves before there is one
        scope.setdefault("state", {})["visit"] = visit

        async def answer(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status, names = message["status"], {name.lower() for name, _ in message["headers"]}
                extra = [(b"x-request-id", secrets.token_hex(8).encode())] + CONTENT_HEADERS
                message["headers"] = [*message["headers"], *(one for one in extra if one[0] not in names)]
            await asyncio.wait_for(send(message), self.limits.send_seconds)

        self.requests += 1
        try:
            try:
                self._check(scope)
                if scope["path"].startswith("/v1/"):  # no other takes a body
                    receive = _again(await self._body(scope, receive, visit), receive)
                await self.app(scope, receive, answer)
            except ClientLeft:
                status = 499
            except Exception as error:
                if not isinstance(error, Refused):
                    log.error("a request failed: %s", where_it_failed(error))
                if status != 499:  # a reply is under way already, and ends here
                    raise
                await self.failure(error)(scope, receive, answer)
        finally:
            self.requests -= 1
            visit.end()
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.ended(route, status, time.monotonic() - visit.started, visit.to_first_token)

    def _check(self, scope):
        headers = dict(scope["headers"])
        if self.hosts is not None and not _is_known(headers.get(b"host", b""), self.hosts):
            raise Refused(
                421, "this server is not known by the name in the request's Host: start it with --allowed_host NAME"
            )
        if self.requests > self.limits.requests:
            raise Refused(503, f"at most {self.limits.requests} requests are served at a time", retry_after="5")
        path = scope["path"]
        if not path.startswith("/v1/"):
            return
        if self.key and not hmac.compare_digest(_bearer(headers), self.key):
            raise Refused(
                401, "this server asks for a key: send it as Authorization: Bearer KEY", "invalid_api_key",
                www_authenticate="Bearer",
            )  # fmt: skip
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and path not in UPLOADS and kind != b"application/json":
            raise Refused(415, "the body must be JSON: send Content-Type: application/json")

    async def _body(self, scope, receive, visit):
        """A request's body, whole. Refused: it is too large, or comes too slowly."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = Refused(413, f"the body is larger than {self.limits.body} bytes, this server's limit",
                            connection="close")  # fmt: skip
        if not length.isdigit() or len(length) > 15 or int(length) > self.limits.body:
            raise too_large

        async def read():
            body = bytearray()
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                chunk = message.get("body", b"")
                visit.hold(len(chunk))
                body += chunk
                if len(body) > self.limits.body:
                    raise too_large
                if not message.get("more_body"):
                    break
            if sum(map(body.count, b",[{")) > self.limits.values:  # Python's objects take much more than their text
                raise Refused(413, f"the body has more than {self.limits.values} values, this server's limit")
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            seconds = f"{self.limits.body_seconds:g}"
            raise Refused(408, f"the body did not come within {seconds} seconds", connection="close") from None


def _again(body, receive):
    """`receive` of a request whose body was read."""
    bodies = [body]

    async def received():
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return received


def _bearer(headers):
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""


def _is_known(host, names):
    """Whether the Host of a request is an address, which no page elsewhere can have made its own name lead to, or a
    name that is known."""
    name = host.decode("latin-1").lower()
    name = name[1 : name.find("]")] if name.startswith("[") else name.rsplit(":", 1)[0]
    if name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def where_it_failed(error):
    """Of what kind an error is and where it was raised, without its message, which may hold what a user wrote."""
    trace, place = error.__traceback__, ""
    while trace:
        code = trace.tb_frame.f_code
        place, trace = f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}", trace.tb_next
    return f"{type(error).__name__} at {place}"
