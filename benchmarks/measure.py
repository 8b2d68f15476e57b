# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One measurement in a process of its own, and how it is started and timed.

As a program: `measure.py SIDE MODULE.FUNCTION ARGUMENTS` calls the function with the side's module and the arguments,
a JSON object, and prints what it returns as JSON, with the versions. A side is a module that knows a framework: `ours`
in this project's environment, or `peer.theirs` and `peer.llama` in those of the peers, where nothing of Paddle can be
imported.
"""

import importlib
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools/mini")]

from paddlemix.machine import peak_host_memory

PEER, LLAMA = "peer.theirs", "peer.llama"
PYTHONS = {PEER: "peer_python", LLAMA: "llama_python"}  # the options that name them


def threads():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def timed(function, *arguments):
    """(seconds, result)"""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def best_rate(amount, function, repeats=5):
    """`amount` (bytes or operations of a call) over the seconds of the quickest call."""
    return amount / min(timed(function)[0] for _ in range(repeats))


def call(args, side, function, environment=(), **arguments):
    """Call "module.function" of a side in a process of its own; the dict that it returns, with "versions"."""
    print(f"  {side.rpartition('.')[2]}: {function} ...", end=" ", flush=True)
    python = getattr(args, PYTHONS[side]).absolute() if side in PYTHONS else sys.executable
    command = [python, HERE / "measure.py", side, function, json.dumps(arguments, default=str)]
    return json.loads(run(command, **dict(environment)).splitlines()[-1])


def run(command, **environment):
    """Run a command on the cores of this process, print its seconds, and return its output."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads()))
    environment = {**os.environ, **counts, "HF_HUB_OFFLINE": "1", **environment}
    seconds, done = timed(lambda: subprocess.run(command, capture_output=True, text=True, env=environment))
    if done.returncode:
        sys.exit(f"failed with {done.returncode}\n{done.stderr[-3000:]}")
    print(f"{seconds:.0f} s", flush=True)
    return done.stdout


# --- what both sides do ----------------------------------------------------------------------------------


def limits(side):
    """The machine's rates as the side's framework reaches them."""
    return side.limits(threads())


def vision(side, checkpoint, inputs, outputs, warm):
    """Encode an image and decode other, fixed codes, so that a tie in one does not show in the other."""
    given = np.load(inputs)
    load_s, (encode, decode) = timed(side.load_vision, Path(checkpoint))
    calls = []
    for _ in range(1 + warm):
        encode_s, codes = timed(encode, given["pixels"])
        decode_s, pixels = timed(decode, given["codes"])
        calls.append({"encode_s": encode_s, "decode_s": decode_s, "peak_bytes": peak_host_memory()})
    found = {"codes": codes, "pixels": pixels}
    np.savez(outputs, **found, **side.margins("vision", given, codes))  # after all that is measured
    return {"load_s": load_s, "calls": calls}


def generate(side, checkpoint, inputs, outputs, warm, dtype="float32", decoding="step"):
    """Generate one image greedily, with guidance."""
    given = {name: value.tolist() for name, value in np.load(inputs).items()}
    load_s, generate_image = timed(side.load_generation, Path(checkpoint), given, dtype, decoding)
    calls = []
    for _ in range(1 + warm):
        seconds, (codes, passes) = timed(generate_image)
        calls.append({"seconds": seconds, "forward_passes": passes, "peak_bytes": peak_host_memory()})
    np.savez(outputs, codes=codes, **side.margins("generate", np.load(inputs), codes))
    return {"load_s": load_s, "calls": calls}


def main():
    side, function, arguments = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("GLOG_minloglevel", "2")
    side = importlib.import_module(side)
    versions = side.start(threads())
    module, _, name = function.rpartition(".")
    result = getattr(importlib.import_module(module), name)(side, **json.loads(arguments))
    print(json.dumps({**(result or {}), "versions": versions}))


if __name__ == "__main__":
    main()
