# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Many clients at once: throughput and latency of the service's engine, beside one client who waits for each result.

Every client asks again as soon as it has its result. Pictures have guidance, so two rows each; answers are to a text.
Fails where a result is not the one that the same request has alone.
"""

import queue
import statistics
import threading
import time
from pathlib import Path

from compare import LANGUAGE_CONFIG
from machine import describe
from measure import call

TITLE = "Many clients at once"
HEADS = ["clients", "what each asks for", "requests", "seconds", "tokens/s", "latency, median", "latency, longest",
         "times as fast as one client"]  # fmt: skip
WORKS = {"pictures": "a picture of {0} x {0} tokens", "answers": "{0} tokens of an answer"}


def add_arguments(parser):
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 4, 8, 16], help="beside one")
    parser.add_argument("--requests", type=int, default=2, help="of each client; one client makes all of them")
    parser.add_argument("--picture", type=int, default=12, help="tokens of a picture's side")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--plot", help="draw the table as this SVG, as docs/serving.svg is")


def run(args, page):
    given = {name: getattr(args, name) for name in ("clients", "requests", "picture", "answer", "dtype")}
    given |= {"clients": [2], "picture": 2, "answer": 3} if args.small else {}
    r = call(args, "ours", "serving.measure", directory=args.directory / "checkpoints", small=args.small, **given)
    text = (
        f"Hidden 1024 x 8 layers over the real vocabulary, {args.dtype}, random weights, through `paddlemix.serving`'s "
        "engine; a tokenizer of the released layout with 32 channels decodes the pictures. Results are those that the "
        "same requests have one by one, bit for bit."
    )
    page.put(TITLE, HEADS, r["rows"], text, {"serving": "equal" if r["equal"] else "**NOT EQUAL**"}, names=2)
    page.put_machine(["serving"], describe(r["versions"]))
    if args.plot:
        plot(r["rows"], args.plot)
    yield "serving", r["equal"], r


def plot(rows, path):
    """Throughput and latency over the number of clients, of each kind of work."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for work in dict.fromkeys(row[1] for row in rows):
        mine = [row for row in rows if row[1] == work]
        clients = [int(row[0]) for row in mine]
        left.plot(clients, [float(row[4]) for row in mine], "o-", label=work)
        right.plot(clients, [float(row[5].split()[0]) for row in mine], "o-", label=f"{work}, median")
    left.set(title="tokens a second, all clients", xlabel="clients", ylim=(0, None))
    right.set(title="latency of a request in seconds", xlabel="clients", ylim=(0, None))
    left.legend()
    figure.savefig(path, metadata={"Date": None})


def measure(side, directory, small, clients, requests, picture, answer, dtype):
    """{"rows": the table's, "equal": whether results are those of one client}"""
    from random_checkpoints import LANGUAGE_CONFIG as SMALL_CONFIG
    from random_checkpoints import write_language_model, write_vision_tokenizer

    from paddlemix.pipelines import Emu3Pipeline
    from paddlemix.serving.engine import Chat, Draw, Engine

    directory = Path(directory)
    write_language_model(directory / "language", SMALL_CONFIG if small else LANGUAGE_CONFIG)
    write_vision_tokenizer(directory / "small-vision")
    pipeline = Emu3Pipeline(directory / "language", directory / "small-vision", dtype)
    engine = Engine({"model": pipeline}, max_batch=2 * max(clients))
    engine.start()
    while engine.state == "loading":
        time.sleep(0.1)
    makers = {
        "pictures": lambda i: Draw(
            "model", "a red circle", 1, {"height": 8 * picture, "width": 8 * picture, "seed": i}
        ),
        "answers": lambda i: Chat(
            "model", [("user", [f"Tell me {i} things."])], answer, {"temperature": 1.0, "seed": i}
        ),
    }  # fmt: skip
    rows, is_equal, sizes = [], True, {"pictures": picture, "answers": answer}
    for work, make in makers.items():
        crowd(engine, make, 1, 1)  # which warms up
        for count in [1, *clients]:
            seconds, results, latencies = crowd(engine, make, count, requests * (max(clients) if count == 1 else 1))
            rate = sum(result.tokens for result in results.values()) / seconds
            if count == 1:
                alone, alone_rate = results, rate
            is_equal &= all(same(result, alone[i]) for i, result in results.items())
            rows.append([
                str(count), WORKS[work].format(sizes[work]), str(len(results)), f"{seconds:.1f}",
                f"{rate:.1f}", f"{statistics.median(latencies):.2f} s", f"{max(latencies):.2f} s",
                f"**{rate / alone_rate:.2f}**",
            ])  # fmt: skip
    engine.drain(0)
    return {"rows": rows, "equal": is_equal}


def same(a, b):
    if hasattr(a, "text"):
        return a.text == b.text
    return all(x.tobytes() == y.tobytes() for (x, _), (y, _) in zip(a.pictures, b.pictures, strict=True))


def crowd(engine, make, clients, each):
    """(seconds, {number of a request: its result}, latencies) of so many clients, each with so many requests."""
    results, latencies = {}, []

    def client(numbers):
        for i in numbers:
            job, events, start = make(i), queue.Queue(), time.perf_counter()
            job.listen(events.put)
            engine.submit(job)
            while not hasattr(event := events.get(), "result"):
                if hasattr(event, "error"):
                    raise event.error
            latencies.append(time.perf_counter() - start)
            results[i] = event.result

    threads = [threading.Thread(target=client, args=(range(k, clients * each, clients),))
               for k in range(clients)]  # fmt: skip
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, results, latencies
