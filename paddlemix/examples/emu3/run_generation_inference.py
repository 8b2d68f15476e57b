# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Text-to-image. See paddlemix/commands/generate.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])  # this checkout's paddlemix, installed or not

from paddlemix.commands import generate
from paddlemix.commands.console import run

if __name__ == "__main__":
    run(generate.parser(), generate.main)
