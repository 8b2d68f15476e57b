# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What every part of the package shares: the user's mistakes, batches of named tensors, safe writing."""

import fcntl
import json
import os
import reprlib
import tempfile
from contextlib import contextmanager
from numbers import Integral
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


def shown(value):
    """A value in an error message: one line, cut where it is long."""
    return " ".join(reprlib.repr(value).split())


def whole_numbers(name, values, least=-(2**63), most=2**63 - 1):
    """Whole numbers in any form, a number, lists, a numpy array or a Paddle tensor, as an int64 array of their shape.

    InputError: numbers out of bounds, or anything else. Floats and booleans are not cut to whole numbers.
    """
    import numpy as np

    try:
        array = np.array(_plain(values), dtype=object)  # else numpy finds a common type for numbers of several
    except ValueError:  # lists of several lengths
        array = np.array(None)
    is_whole = all(issubclass(kind, Integral) and kind is not bool for kind in set(map(type, array.flat)))
    if not is_whole or (array.size and not least <= array.min() <= array.max() <= most):
        upper = "" if most == 2**63 - 1 else f" to {most}"
        limits = "" if least == -(2**63) else f" from {least}{upper}"
        raise InputError(f"{name} must be whole numbers{limits}, got {shown(values)}")
    return array.astype(np.int64)


def _plain(values):
    """Arrays and tensors of whole numbers, also in lists, as lists of int; others as None."""
    if isinstance(values, (list, tuple)):
        return [_plain(v) if hasattr(v, "dtype") or isinstance(v, (list, tuple)) else v for v in values]
    if hasattr(values, "dtype"):
        return values.tolist() if "int" in str(values.dtype) else None
    return values


def whole_number(name, value, accepted, least, most=2**63 - 1):
    """One of them, as an int. The InputError says that `name` must be `accepted`."""
    try:
        array = whole_numbers(name, value, least, most)
    except InputError:
        array = None
    if array is None or array.ndim:
        raise InputError(f"{name} must be {accepted}, got {shown(value)}")
    return int(array)


def real_number(name, value, accepted, least, most, advice=""):
    """A number from `least` to `most` as a float. The InputError says that `name` must be `accepted`, and `advice`."""
    try:
        number = float("nan" if isinstance(value, (str, bytes, bool)) else value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not least <= number <= most:
        raise InputError(f"{name} must be {accepted}, got {shown(value)}{advice}")
    return number


def check_utf_8(name, text):
    """InputError: the text holds half of a surrogate pair, as of JSON's "\\ud800", which no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{name} is not UTF-8: {shown(text)}") from None


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


@contextmanager
def alone_in(folder):
    """Around a job: no other one begins in its folder meanwhile, and a kill ends it too. Where a file system has no
    such locks none is refused.

    InputError: another one goes on there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        reason = f"another process writes into {folder} now"
        raise InputError(f"{reason}: wait for it, end it, or give another folder") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


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
