# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rounds of tests/test_fuzz.py with new inputs, for as long as it is told; it ends at the first round that fails.

    .venv/bin/python tools/fuzz.py --seconds 600

A finding is printed with its smallest input, and kept in .hypothesis/, where later runs try it first. A round takes
a minute or two, and the last one is finished.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round; printed")
    args, more = parser.parse_known_args()  # `more` goes to pytest: -k pictures
    started, seed, inputs, code = time.monotonic(), args.seed, Counter(), 0
    while not code and time.monotonic() - started < args.seconds:
        command = [sys.executable, "-m", "pytest", "tests/test_fuzz.py", "--hypothesis-profile=long"]
        command += [f"--hypothesis-seed={seed}", "--hypothesis-show-statistics", *more]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": "."})
        code = done.returncode
        for name, part in re.findall(r"^tests/test_fuzz.py::(\w+):\n\n((?: .*\n|\n)+)", done.stdout, re.MULTILINE):
            inputs[name] += sum(map(int, re.findall(r"(\d+) (?:passing|failing)\b", part)))
        total = sum(inputs.values())
        print(f"seed {seed}: {total} inputs in {time.monotonic() - started:.0f} s", flush=True)
        if code:
            print(done.stdout.split("= Hypothesis Statistics")[0], done.stderr)
            print("again:", " ".join(command))
        seed += 1
    for name, count in inputs.items():
        print(f"{count:9} {name}")
    sys.exit(code)


if __name__ == "__main__":
    main()
