# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What every part of the package shares: the user's mistakes, batches of named tensors, safe writing."""

import json
import os
import tempfile
from pathlib import Path


class InputError(ValueError):
    """A mistake in what the user gave. Its message is one line that a command prints as it is."""


def read_bytes(path, most=64 << 20):
    """The bytes of a small file. InputError: it is missing, larger than `most`, not a regular file, or unreadable."""
    path = Path(path)
    try:
        if not os.path.lexists(path):
            raise InputError(f"{path}: there is no such file")
        if not path.is_file():  # a pipe or a device has no end
            raise InputError(f"{path} is not a regular file: download it again")
        if path.stat().st_size > most:
            raise InputError(f"{path} has {path.stat().st_size} bytes, at most {most} are read: download it again")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check who may read it, and the disk") from None


def read_json(path):
    """The dict in a small JSON file, UTF-8. InputError: as `read_bytes`, or it does not hold one JSON object."""
    data = read_bytes(path)
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number without end, nested without end
        raise InputError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold one JSON object, it holds a {type(values).__name__}")
    return values


class BatchFeature(dict):
    """A dict whose keys can be read as attributes: `inputs.input_ids` is `inputs["input_ids"]`."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this batch has no {name!r}, only {sorted(self)}") from None


def pad_rows(rows, pad, side="left", length=0):
    """Rows of ids -> (ids, mask), int64 arrays [rows, width]: padded to the longest row, or to `length` if longer.

    The mask is 1 at a row's own ids and 0 at padding.
    """
    import numpy as np

    width = max([length, *map(len, rows)])
    ids = np.full([len(rows), width], pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask


def write_atomically(path, content):
    """Write text or bytes to `path`, whole or not at all."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path) as temporary:
        Path(temporary).write_bytes(data)


class replacing:
    """A temporary file beside `path` that takes its place if all goes well and vanishes if not.

    Through a link it is the file that the link leads to. InputError: what is there is not a regular file.
    """

    def __init__(self, path):
        self.path = Path(os.path.realpath(path))
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"{path} is not a regular file: it is not replaced; give the name of a file")

    def __enter__(self):
        handle, self.temporary = tempfile.mkstemp(
            prefix=f".{self.path.stem}-", suffix=self.path.suffix, dir=self.path.parent
        )
        os.close(handle)
        return self.temporary

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(self.temporary, 0o666 & ~umask)  # as any new file: mkstemp's is the owner's alone
                os.replace(self.temporary, self.path)
        finally:
            Path(self.temporary).unlink(missing_ok=True)
