# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Compiles the operators and installs them for the Python that runs this, from a checkout or an installed package:

    python -m paddlemix.external_ops.build

A temporary folder holds what comes up on the way. setup.py decides what is compiled; where nvcc fails, the operators
are built for the CPU.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECK = "from paddlemix.external_ops import status, vectors; print(status()[1] or vectors())"


def main():
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder, "external_ops")
        shutil.copytree(HERE, sources, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        code, log = setup(sources)
        device = "a CPU and CUDA" if "external_ops: CUDA for" in log else "a CPU"
        if code and device != "a CPU":
            print("external_ops: nvcc failed, so the operators are built only for the CPU")
            device = "a CPU"
            code, log = setup(sources, EMU3_OPS_CUDA="0")
    if code:
        *_, last = log.strip().splitlines() or [""]
        if last.startswith("external_ops: "):  # setup.py says what is missing
            return last
        return f"external_ops: compiling failed with exit code {code}; its log:\n{log}"
    found = run([sys.executable, "-W", "ignore", "-c", CHECK], EMU3_OPS="1").stdout.strip().splitlines()
    if not found or found[-1].startswith(("are ", "do ")):
        return f"external_ops: the operators were installed but {found[-1] if found else 'do not run'}"
    print(f"external_ops: built for {device} in {time.monotonic() - start:.0f} s; here they use: {found[-1]}")
    return 0


def setup(sources, **environment):
    """(exit code, log)"""
    done = run([sys.executable, "setup.py", "install"], cwd=sources, **environment)
    return done.returncode, done.stdout


def run(command, cwd=None, **environment):
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


if __name__ == "__main__":
    sys.exit(main())
