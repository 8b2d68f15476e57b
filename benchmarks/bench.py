# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The benchmarks: this project beside other programs and beside the limits of the machine.

    make bench                                          # the command compare, which takes an hour
    make bench BENCH=--quick                            # the same for small images, minutes
    make bench BENCH="operators --parts linear"         # another command, one part of it
    python benchmarks/bench.py COMMAND --help

Every measurement is a process of its own. Results go into benchmarks/RESULTS.md, where parts that were not measured
stay, and raw numbers into benchmarks/run. The exit code is 1 where a result is not what it is compared with.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from measure import HERE, ROOT
from page import Page
from summary import opening

from paddlemix.utils import write_atomically

COMMANDS = {
    "compare": "beside Hugging Face transformers: the same results, seconds and memory",
    "operators": "the custom operators on a CPU, beside Paddle, PyTorch and the read bandwidth",
    "released": "the released language model's size: loading and forward passes",
    "quality": "what bfloat16, int8 and int4 weights cost: Emu3-Mini beside itself in float32",
    "prompts": "beside llama.cpp: long prompts, and decoding of one row to eight",
    "serving": "many clients at once: throughput and latency of the service's engine",
    "speculation": "windows of guesses on a CPU: the tokens that they gain, and what larger forward passes cost",
    "loading": "peak memory and time of loading a checkpoint",
    "training": "a step of fine-tuning beside transformers: tokens a second and memory",
    "costs": "seconds and memory of each task against size, beside a model of them",
}
PEERS = {"peer": "transformers and PyTorch", "llama": "llama.cpp"}  # of a command with HAS_PEER or HAS_LLAMA


def main():
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["compare", *arguments]
    args = parse(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # the processes started here inherit it
    if args.small:
        args.directory /= "small"
    args.directory.mkdir(parents=True, exist_ok=True)
    raw_path = args.directory / f"{args.command}.json"
    raw = json.loads(raw_path.read_text()) if raw_path.exists() else {}
    page, all_equal = Page(None if args.small else args.report), True
    for part, equal, result in importlib.import_module(args.command).run(args, page):
        all_equal &= equal
        raw[part] = result
        write_atomically(raw_path, json.dumps(raw, indent=1) + "\n")
        if not args.small:
            write_atomically(args.report, page.text(opening(page)))
    print(f"raw results in {raw_path}" if args.small else f"wrote {args.report}")
    return int(not all_equal)


def parse(arguments):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help="(default: compare)")
    for name, text in COMMANDS.items():
        module = importlib.import_module(name)
        command = commands.add_parser(name, help=text, description=module.__doc__, formatter_class=raw)
        module.add_arguments(command)
        command.add_argument("--small", action="store_true", help="small sizes, to try the program; RESULTS.md stays")
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores to use")
        command.add_argument("--directory", type=Path, default=HERE / "run", help="checkpoints and raw results")
        command.add_argument("--report", type=Path, default=HERE / "RESULTS.md")
        for peer, what in PEERS.items():
            if getattr(module, f"HAS_{peer.upper()}", False):
                python = Path(os.environ.get(f"{peer.upper()}_PYTHON") or ROOT / f".venv-{peer}/bin/python")
                command.add_argument(f"--{peer}_python", type=Path, default=python, help=f"a Python with {what}")
                command.add_argument(f"--no_{peer}", action="store_true", help=f"without {what}")
    args = parser.parse_args(arguments)
    for peer in PEERS:
        if not getattr(args, f"no_{peer}", True) and not (python := getattr(args, f"{peer}_python")).exists():
            parser.error(f"{python} is missing: make bench makes it, or give --{peer}_python or --no_{peer}")
    return args


if __name__ == "__main__":
    sys.exit(main())
