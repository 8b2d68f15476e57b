# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The small file that an unfinished drawing leaves, and going on from it."""

import io
import json
import os
import signal
import zipfile
from pathlib import Path

from paddlemix.results import claim_paths
from paddlemix.utils import InputError, write_atomically

from .console import note

SUFFIX = ".tokens.npz"
MOST_BYTES = 1 << 28  # of all tokens in a file: more than any drawing has


class Unfinished:
    """`with Unfinished(...) as unfinished:` around a drawing; after Ctrl-C a line names the way to resume it,
    and after a kill the file is there.

    Args:
        args: of the command, with output_dir and resume.
        settings: what decides which tokens are drawn, as JSON has it; a seed of None is any seed.

    `settings` and `drawn` (of each picture int64 [positions], None at the start) are then what to go on with.
    """

    def __init__(self, args, settings):
        self.settings, self.drawn, self.folder, self.path = settings, None, args.output_dir, None
        self.failed = False
        if args.resume:
            self._find(Path(args.output_dir))

    def _find(self, folder):
        """Take the newest file of these settings. InputError: there are only others."""
        files = [p for p in folder.glob(f"*{SUFFIX}") if p.stat().st_size]  # an empty one is a name claimed
        files.sort(key=lambda p: p.stat().st_mtime, reverse=True)
        if not files:
            note(f"nothing to resume in {folder}: starting")
            return
        for path in files:
            settings, drawn = _read(path)
            if not _differences(settings, self.settings):
                self.path, self.settings, self.drawn = path, settings, drawn
                return
        differences = "; ".join(_differences(_read(files[0])[0], self.settings))
        raise InputError(f"{files[0]} is of another drawing: {differences}; repeat its command, or leave out --resume")

    def save(self, drawn):
        """drawn: the tokens of each picture so far, int64 [positions]."""
        import numpy as np

        file = io.BytesIO()
        tokens = {f"drawn_{i}": row for i, row in enumerate(drawn)}
        np.savez_compressed(file, settings=json.dumps(self.settings), **tokens)
        try:
            self.path = self.path or claim_paths(self.folder, "result", 1, SUFFIX)[0]
            write_atomically(self.path, file.getvalue())
            self.drawn = drawn
        except OSError as error:  # a full disk may have room again when the picture is done
            if not self.failed:
                note(f"cannot keep what is drawn so far in {self.folder}: {error.strerror}; drawing on")
            self.failed = True
            if self.drawn is None and self.path:  # only the name is there
                self.path.unlink(missing_ok=True)
                self.path = None

    def finish(self):
        if self.path:
            self.path.unlink(missing_ok=True)

    def __enter__(self):
        self.terminated = False
        self.before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def _terminate(self, *signal_and_frame):
        self.terminated = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Paddle's launcher sends it several times
        raise KeyboardInterrupt

    def __exit__(self, kind, error, traceback):
        signal.signal(signal.SIGTERM, self.before)
        if self.terminated:
            os.kill(os.getpid(), signal.SIGTERM)
        if kind is KeyboardInterrupt and self.drawn is not None:
            raise KeyboardInterrupt(f"the same command with --resume goes on from {self.path}") from error


def _read(path):
    """(settings, of each picture the tokens). InputError: the file holds anything else."""
    import numpy as np

    try:
        with zipfile.ZipFile(path) as file:
            if sum(part.file_size for part in file.infolist()) > MOST_BYTES:
                raise ValueError
        with np.load(path, allow_pickle=False) as file:
            settings = json.loads(str(file["settings"]))
            drawn = [file[f"drawn_{i}"] for i in range(len(settings["prompt"]))]
            is_whole = isinstance(settings["prompt"], list) and type(settings["seed"]) is int
            if not is_whole or not all(d.ndim == 1 and d.dtype.kind == "i" for d in drawn):
                raise ValueError
            return settings, drawn
    except Exception:  # whatever NumPy, zip and JSON make of a damaged file
        raise InputError(f"{path} is damaged, or of another version: remove it, or leave out --resume") from None


def _differences(saved, asked):
    names = [k for k in asked if saved.get(k) != asked[k] and not (k == "seed" and asked[k] is None)]
    return [f"its {k} is {saved.get(k)!r}, asked for is {asked[k]!r}" for k in names]
