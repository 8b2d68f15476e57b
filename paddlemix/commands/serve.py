# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A service: OpenAI's endpoints over HTTP, and a page, for many people who draw and ask at the same time."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time

from paddlemix.machine import start_paddle
from paddlemix.utils import InputError, shown

from .console import DEVICE_HELP, bare_parser, integer, note, number, say, to_stderr
from .language_model import LORA_HELP, add_dtype, add_tensor_parallel, follows, make_ranks, note_dtype

KEY = "EMU3_API_KEY"
LEAST = {"max_batch": 1, "max_queue": 1, "max_pixels": 64, "max_tokens": 1, "max_body": 0.001, "max_seconds": 1,
         "drain_seconds": 0, "replicas": 1}  # fmt: skip


def parser(prog=None):
    parser = bare_parser(__doc__, prog)
    parser.add_argument("--model_path", help="the model that draws: a directory, a hub name, or emu3-mini")
    parser.add_argument(
        "--chat_model_path", help="the model that answers, likewise; the same as --model_path is loaded once (default: "
        "none, and of emu3-mini itself)"
    )  # fmt: skip
    parser.add_argument("--lora_path", help=f"of --model_path: {LORA_HELP}")
    parser.add_argument(
        "--chat_lora_path", help="the same of --chat_model_path (default: none; where both models are one, --lora_path)"
    )  # fmt: skip
    parser.add_argument(
        "--vq_model_path", dest="vision_path",
        help="the vision tokenizer: a directory or a hub name (default: BAAI/Emu3-VisionTokenizer, or emu3-mini's own)",
    )  # fmt: skip
    add_dtype(parser)
    add_tensor_parallel(parser)
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 is all of this machine")
    parser.add_argument("--port", type=integer, default=8000, help="0 is a free one")
    parser.add_argument("--api_key", help=f"what requests must carry (default: {KEY} of the environment, or none)")
    parser.add_argument("--max_batch", type=integer, default=16, help="rows of a pass; a picture with guidance has two")
    parser.add_argument("--max_queue", type=integer, default=64, help="requests that wait; those beyond it get 429")
    parser.add_argument("--max_body", type=number, default=32, help="of a request, in MB")
    parser.add_argument("--max_pixels", type=integer, default=1 << 20, help="of a picture that is drawn")
    parser.add_argument("--max_tokens", type=integer, default=4096, help="of an answer")
    parser.add_argument("--max_seconds", type=number, default=3600, help="of a request, waiting included")
    parser.add_argument(
        "--output_dir", help="keep finished pictures here, and what was accepted: after a restart it is finished"
    )
    parser.add_argument(
        "--drain_seconds", type=number, default=30, help="after SIGTERM or Ctrl-C: for what runs to be finished"
    )
    parser.add_argument("--allow_image_urls", action="store_true", help="fetch the http(s) URLs of pictures in chats")
    parser.add_argument("--cors_origin", nargs="+", default=[], help="origins of pages elsewhere that may ask")
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="serve from several processes by Ray Serve, of a cluster "
        "where an address is given (auto: the one that runs here), else on this machine; it takes pip install "
        '"ray[serve]==2.60.0"',
    )  # fmt: skip
    parser.add_argument("--replicas", type=integer, default=1, help="with --ray: processes, each with its own model")
    parser.add_argument(
        "--allowed_host", nargs="+", help="names in a request's Host that are taken, beside addresses and localhost "
        "(default: any, but none on 127.0.0.1 without a key)"
    )  # fmt: skip
    return parser


def main(args):
    key, ranks = check(args), make_ranks(args)
    if ranks and ranks.rank:
        follows(make_pipelines(args, ranks)[0])
        return
    listener = listen(args.host, args.port)
    if not is_loopback(args.host) and not key:
        note(f"whoever reaches {args.host} may use this server: give --api_key, or {KEY} in the environment")
    if args.ray is None:
        engine, app = build(args, key, ranks)
        asyncio.run(_serve(app, engine, listener, args.drain_seconds))
        return
    make_pipelines(args)  # a mistyped name is told here
    host, port = listener.getsockname()[:2]
    listener.close()  # for Ray's proxy
    replicate(args, key, host, port)


def build(args, key, ranks=None):
    """(Engine, application), nothing started."""
    from paddlemix.serving.app import make_app
    from paddlemix.serving.engine import Engine
    from paddlemix.serving.guard import Limits

    pipelines, names = make_pipelines(args, ranks)
    _log(args.verbose)
    engine = Engine(
        pipelines, max_batch=args.max_batch, max_queue=args.max_queue, output_dir=args.output_dir
    )  # fmt: skip
    limits = Limits(
        body=int(args.max_body * 1e6), pixels=args.max_pixels, tokens=args.max_tokens, seconds=args.max_seconds
    )  # fmt: skip
    app = make_app(
        engine, names=names, api_key=key, limits=limits, cors_origins=args.cors_origin, hosts=known_hosts(args, key),
        allow_image_urls=args.allow_image_urls,
    )  # fmt: skip
    return engine, app


def replicate(args, key, host, port):
    """The same application in several processes, on one machine or more."""
    from paddlemix.serving.replicas import Replicas

    def replica():
        """In a process of its own: the application of an engine that is ready."""
        start_paddle(args.device)
        engine, app = build(args, key)
        engine.start()
        while engine.state == "loading":
            time.sleep(0.05)
        if engine.state == "failed":
            raise InputError(str(engine.reason))
        return app

    ends = threading.Event()
    with Replicas(replica, args.replicas, host, port, args.ray, args.drain_seconds):
        for which in (signal.SIGINT, signal.SIGTERM):  # after Ray, which takes them
            signal.signal(which, lambda *_: os._exit(130) if ends.is_set() else ends.set())
        say(f"listening on {url(host, port)}, {args.replicas} replicas")
        ends.wait()
        to_stderr(f"finishing what runs, for at most {args.drain_seconds:g} seconds; Ctrl-C ends at once")


def url(host, port):
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def check(args):
    """The key, or None. InputError for what cannot be."""
    for name, least in LEAST.items():
        if not least <= getattr(args, name) <= 1e12:
            raise InputError(f"--{name} must be {least:g} to 1e12, got {getattr(args, name)}")
    if not 0 <= args.port <= 65535:
        raise InputError(f"--port must be 0 to 65535, got {args.port}")
    if args.api_key == "":
        raise InputError("--api_key is empty: give a key, or leave it out")
    key = args.api_key or os.environ.get(KEY) or None
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise InputError(f"--api_key, or {KEY}, must be of printable ASCII characters: a header takes no others")
    if args.replicas > 1 and args.ray is None:
        raise InputError("--replicas is for --ray: give both")
    if args.tensor_parallel and args.ray is not None:
        raise InputError("--tensor_parallel and --ray do not go together: give one of the two")
    if not args.model_path and not args.chat_model_path:
        raise InputError("give --model_path, --chat_model_path or both; emu3-mini comes with the package")
    return key


def make_pipelines(args, ranks=None):
    """({name: Emu3Pipeline}, {name: what it does}). InputError where there is no such checkpoint."""
    from paddlemix.models.emu3.hub import MINI
    from paddlemix.pipelines import Emu3Pipeline

    chat_path = args.chat_model_path or (MINI if args.model_path == MINI else None)
    chat_lora = args.lora_path if args.chat_lora_path is None and chat_path == args.model_path else args.chat_lora_path
    pipelines, names, paths = {}, {}, {}
    for path, lora, task in ((args.model_path, args.lora_path, "draw"), (chat_path, chat_lora, "chat")):
        if not path and lora is not None:
            raise InputError(f"there is no model that {shown(lora)} could belong to: give its path as well")
        if not path:
            continue
        name = MINI if path == MINI else folder_name(path)
        name = name if lora is None else f"{name}+{folder_name(lora)}"
        if paths.setdefault(name, (path, lora)) != (path, lora):
            raise InputError(f"two models are called {shown(name)}: give one folder another name")
        if name not in pipelines:
            pipelines[name] = Emu3Pipeline(
                path, args.vision_path, args.dtype, progress=True, lora_path=lora, ranks=ranks
            )
            note_dtype(pipelines[name])  # which reads its config.json: a mistyped name is told here
        names.setdefault(name, []).append(task)
    return pipelines, names


def folder_name(path):
    """The name of a folder without the way to it; a hub name stays what it is."""
    return os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else path


def listen(host, port):
    """A socket that listens. InputError where that cannot be."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        return listener
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is in use: give another --port, or 0 for a free one") from None
        reason = f"cannot listen at {host}, port {port} ({error.strerror})"
        raise InputError(f"{reason}: give another --host or --port") from None


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def known_hosts(args, key):
    """Without a key a server of this machine alone must not be reached through a page whose name leads here."""
    if args.allowed_host is None and (key or not is_loopback(args.host)):
        return None
    return {"localhost", *(name.lower() for name in args.allowed_host or [])}


def _log(verbose):
    """What the service itself has to tell goes to stderr; the libraries' notices do not."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    own = logging.getLogger("paddlemix.serving")
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it writes tracebacks, and those what users wrote
    if not verbose:
        logging.getLogger().setLevel(logging.ERROR)
        for name, logger in logging.root.manager.loggerDict.items():
            if isinstance(logger, logging.Logger) and logger.level and not name.startswith(("paddlemix", "uvicorn")):
                logger.setLevel(logging.ERROR)
    logging.disable(logging.NOTSET)


def make_server(app):
    """The uvicorn.Server of an application; signals are the caller's."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):
            yield

    return Server(uvicorn.Config(
        app, log_config=None, access_log=False, http="h11", ws="none", lifespan="off", server_header=False,
        proxy_headers=False, timeout_keep_alive=30, timeout_graceful_shutdown=5, h11_max_incomplete_event_size=32768,
    ))  # fmt: skip


async def _serve(app, engine, listener, drain_seconds):
    ends, loop = asyncio.Event(), asyncio.get_running_loop()

    def end(which):
        if which == signal.SIGINT and ends.is_set() or engine.state == "loading":
            to_stderr("\ninterrupted")
            os._exit(128 + which)  # whatever its threads do
        ends.set()

    def listen_to_signals():
        for which in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(which, end, which)

    listen_to_signals()
    server = make_server(app)
    engine.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while engine.state == "loading":
        await asyncio.sleep(0.05)
    listen_to_signals()  # once more: PaddleNLP's import, which loading does, takes SIGTERM away
    if engine.state != "failed":
        host, port = listener.getsockname()[:2]
        say(f"listening on {url(host, port)}")
        while not ends.is_set() and engine.state != "failed":  # where another process has ended
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ends.wait(), 0.5)
    if engine.state != "failed":
        to_stderr(f"finishing what runs, for at most {drain_seconds:g} seconds; Ctrl-C ends at once")
        await asyncio.to_thread(engine.drain, drain_seconds)
    server.should_exit = True
    await serving
    if engine.state == "failed":
        raise InputError(str(engine.reason))
