# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One measurement in a process of its own; `bench.py` starts it, in this project's environment or the peer's.

Both sides are timed by this one code. A side is a module (`ours`, `peer.theirs`) that knows how its framework
loads a checkpoint and calls the model, NumPy arrays in and out.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from paddlemix.machine import peak_host_memory


def timed(function, *arguments):
    """(seconds, result)"""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def best_rate(amount, function, repeats=5):
    """`amount` (bytes or operations of a call) over the seconds of the quickest call."""
    return amount / min(timed(function)[0] for _ in range(repeats))


def vision(side, args):
    """Encode a picture and decode other, fixed codes, so that a tie in one does not show in the other."""
    inputs = np.load(args.inputs)
    load_s, (encode, decode) = timed(side.load_vision, args.checkpoint)
    calls = []
    for _ in range(1 + args.warm):
        encode_s, codes = timed(encode, inputs["pixels"])
        decode_s, pixels = timed(decode, inputs["codes"])
        calls.append({"encode_s": encode_s, "decode_s": decode_s, "peak_bytes": peak_host_memory()})
    return {"load_s": load_s, "calls": calls}, {"codes": codes, "pixels": pixels}


def draw(side, args):
    """Draw one picture greedily, with guidance."""
    inputs = {name: value.tolist() for name, value in np.load(args.inputs).items()}
    load_s, draw_picture = timed(side.load_drawing, args.checkpoint, inputs, args.decoding, args.dtype)
    calls = []
    for _ in range(1 + args.warm):
        seconds, (codes, passes) = timed(draw_picture)
        calls.append({"seconds": seconds, "forward_passes": passes, "peak_bytes": peak_host_memory()})
    return {"load_s": load_s, "calls": calls}, {"codes": codes}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "peer.theirs"])
    parser.add_argument("work", choices=["vision", "draw", "limits", "write"])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--inputs", type=Path, help=".npz")
    parser.add_argument("--outputs", type=Path, help=".npz: codes, pixels and what tells how clear the winners are")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm", type=int, default=0, help="calls after the first")
    parser.add_argument("--decoding", default="step")
    parser.add_argument("--dtype", default="float32", help="of the language model's weights")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("GLOG_minloglevel", "2")
    side = importlib.import_module(args.side)
    versions = side.start(args.threads)
    if args.work == "write":
        result = side.write(args.checkpoint)
    elif args.work == "limits":
        result = side.limits(args.threads)
    else:
        result, outputs = (vision if args.work == "vision" else draw)(side, args)
        if hasattr(side, "margins"):  # after all that is measured
            outputs.update(side.margins(args.work, np.load(args.inputs), outputs["codes"]))
        np.savez(args.outputs, **outputs)
    print(json.dumps({**result, "versions": versions}))


if __name__ == "__main__":
    main()
