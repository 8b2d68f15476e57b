# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Reconstruct an image, or a video's frames. See paddlemix/commands/autoencode.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])  # this checkout's paddlemix, installed or not

from paddlemix.commands import autoencode
from paddlemix.commands.console import run

if __name__ == "__main__":
    run(autoencode.parser(), autoencode.main)
