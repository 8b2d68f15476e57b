# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tune a language model on prepared pictures and texts: all of its weights, or low-rank adapters.

It goes on by itself from the last checkpoint in --output_dir. Several processes train together with
`python -m paddle.distributed.launch --nproc_per_node N paddlemix/examples/emu3/train.py ...`.
"""

import argparse
import os
import signal
import sys
import threading
import time
from dataclasses import fields
from statistics import median

from paddlemix.machine import return_freed_memory
from paddlemix.training.settings import Settings

from .console import DEVICE_HELP, bare_parser, integer, note, number, progress_bar, say, to_stderr

PACED = 5  # steps that are measured: the first ones are slower
REQUIRED = ("model_path", "data_path", "output_dir")


def parser(prog=None):
    parser = bare_parser(__doc__, prog)
    for one in fields(Settings):
        kind, how = type(one.default), {}
        if kind is bool:
            how = {"type": _flag, "nargs": "?", "const": True, "metavar": "True"}
        elif kind is tuple:
            how = {"nargs": "+"}
        elif kind in (int, float):
            how = {"type": integer if kind is int else number}
        parser.add_argument(
            f"--{one.name}", required=one.name in REQUIRED, default=None if one.default == () else one.default,
            choices=one.metadata["choices"], help=one.metadata["help"], **how,
        )  # fmt: skip
    parser.add_argument("--device", help=DEVICE_HELP)
    return parser


def _flag(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not True or False")
    return text.lower() == "true"


def main(args):
    from paddlemix.training.train import train

    return_freed_memory()
    given = {one.name: getattr(args, one.name) for one in fields(Settings)}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    stop, ended_by, bar, pace = threading.Event(), [], None, []
    is_first = int(os.environ.get("PADDLE_TRAINER_ID", 0)) == 0  # of several processes the first one prints

    def end(which, _):
        if stop.is_set():
            if which == signal.SIGINT:
                os._exit(128 + which)
            return  # Paddle's launcher sends SIGTERM several times, also after Ctrl-C
        stop.set()
        ended_by.append(which)
        if is_first:
            to_stderr("\nwriting a checkpoint of the last whole step; Ctrl-C again ends at once")

    for event in train(settings, stop, progress=is_first):
        if bar is None:  # now all is loaded, and no library takes signals any more
            for which in (signal.SIGINT, signal.SIGTERM):
                signal.signal(which, end)
            bar = progress_bar(event["max_steps"], " steps", "training", event["step"]) if is_first else ()
        if is_first:
            show(event, bar)
            if "loss" in event and bar.disable:
                pace.append(event["seconds"])
                if len(pace) == PACED:
                    say_pace(median(pace), event["step"], bar.total)
    if ended_by == [signal.SIGTERM]:
        sys.exit(128 + signal.SIGTERM)
    if ended_by:
        raise KeyboardInterrupt("the same command goes on")


def say_pace(seconds, step, last):
    """Print how long a step takes, and when the last one ends, where there is no terminal for a bar."""
    end = time.strftime("%d %B %H:%M", time.localtime(time.time() + seconds * (last - step)))
    say(f"step {step} of {last}: {seconds:.1f} s a step, the end is expected on {end}")


def show(event, bar):
    """Print an event of `train`; its steps move the bar."""
    step = event["step"]
    if "note" in event:
        note(event["note"])
    elif "loss" in event:
        bar.set_postfix_str(f"loss {event['loss']:.4f}, {event['tokens_per_second']:,.0f} tokens/s")
        bar.update()
    elif "eval_loss" in event:
        say(f"step {step}: loss of held-out rows {event['eval_loss']:.4f}")
    else:
        say(f"step {step}: wrote {', '.join(event.get('samples', [event.get('checkpoint')]))}")
