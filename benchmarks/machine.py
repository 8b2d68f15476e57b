# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The machine and the programs that a result was measured with, in one line."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

from measure import ROOT, threads

UNITS = {"read_bytes_per_s": "{:.1f} GB/s", "operations_per_s": "{:.0f} GFLOP/s"}


def describe(versions, limits=None):
    """versions: {program: version}. limits: {"read_bytes_per_s" or "operations_per_s": {what was measured: rate}}."""
    info = Path("/proc/cpuinfo").read_text()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines())}
    sets = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    sets = " ".join(s for s in sets if s in fields.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    programs = ", ".join(f"{name} {version}" for name, version in versions.items())
    cpu = fields.get("model name", platform.machine())
    text = (
        f"commit {commit()}, {datetime.date.today()}; {cpu}, {threads()} cores, {sets}, "
        f"{memory / 1e9:.0f} GB, {platform.system()} {platform.release()}; "
        f"Python {platform.python_version()}, {programs}"
    )
    rates = [f"{name} {UNITS[kind].format(r / 1e9)}" for kind, of in (limits or {}).items() for name, r in of.items()]
    return text + (f". Limits: {', '.join(rates)}." if rates else ".")


def commit():
    """The commit that was measured; with a + where tracked files were changed."""
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
