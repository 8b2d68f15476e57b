# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tune the language model, with one process or several. See paddlemix/commands/train.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])  # this checkout's paddlemix, installed or not

from paddlemix.commands import train
from paddlemix.commands.console import run

if __name__ == "__main__":
    run(train.parser(), train.main)
