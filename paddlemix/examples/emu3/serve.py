# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A service over HTTP, and a page. See paddlemix/commands/serve.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])  # this checkout's paddlemix, installed or not

from paddlemix.commands import serve
from paddlemix.commands.console import run

if __name__ == "__main__":
    run(serve.parser(), serve.main)
