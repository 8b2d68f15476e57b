# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a user runs: arguments, progress, files and one-line errors around the library.

Each command is a module with a `parser` and a `main`. The modules import neither Paddle nor numpy before they need
them, so that `--help` is quick.
"""
