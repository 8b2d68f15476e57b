# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Image question answering. See paddlemix/commands/understand.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])  # this checkout's paddlemix, installed or not

from paddlemix.commands import understand
from paddlemix.commands.console import run

if __name__ == "__main__":
    run(understand.parser(), understand.main)
