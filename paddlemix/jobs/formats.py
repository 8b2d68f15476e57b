# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Formats that rows come in: JSON, JSON lines, Parquet, WebDataset, a folder of images.

A reader takes a path and gives, of each row in order, its place in the file and a function that reads its values. That
function raises InputError where one row is wrong, the reader where the file is.
"""

import json
import os
import re
import tarfile
from codecs import BOM_UTF8
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path

from paddlemix.utils import InputError, read_bytes, shown

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PART = 1 << 20  # characters of a JSON list that are read at once
MOST_BYTES = 1 << 28  # of a file in a tar, of an element of a JSON list
SPACES = re.compile(r"[ \t\r\n]*")


@dataclass
class Span:
    """A file inside a tar, read when it is needed."""

    path: Path
    start: int
    size: int

    def read(self):
        if self.size > MOST_BYTES:
            raise InputError(f"{self.size} bytes are too many for one image or text: at most {MOST_BYTES} are taken")
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def first_bytes(path):
    """The first bytes of a file; InputError where it cannot be read."""
    if not path.is_file():
        read_bytes(path)
    with path.open("rb") as file:
        return file.read(1 << 16)


def read_json_rows(path):
    start = first_bytes(path).removeprefix(BOM_UTF8).lstrip()
    if start[:1] == b"[":
        yield from ((number, lambda value=value: value) for number, value in enumerate(_elements(path), 1))
    elif start[:1] in (b"{", b""):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, partial(_loaded, line.removeprefix(BOM_UTF8))
    else:
        raise InputError(f"{path} is neither a JSON list nor lines of JSON objects: check the path")


def _loaded(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})") from None


def _elements(path):
    """The elements of a JSON list, which is never whole in memory."""
    decode, text, at = json.JSONDecoder().raw_decode, "", 0
    with path.open(encoding="utf-8-sig") as file:
        while _more(file, path, 1) != "[":
            pass
        while True:
            try:
                start = SPACES.match(text, at).end()
                if text[start] == "]":
                    return
                value, end = decode(text, start)
                end = SPACES.match(text, end).end()
                if text[end] not in ",]":  # nor was a number cut in two
                    raise ValueError(f"no comma before {shown(text[end : end + 20])}")
            except (IndexError, ValueError, RecursionError) as error:
                rest = text[at:]
                more = "" if len(rest) > MOST_BYTES else _more(file, path, max(PART, len(rest)))
                if not more:
                    raise InputError(f"{path} is not a JSON list, or cut short ({error}): check the file") from None
                text, at = rest + more, 0
                continue
            yield value
            at = end + (text[end] == ",")


def _more(file, path, count):
    try:
        return file.read(count)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from None


def read_parquet(path):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file, or damaged ({error}): check the path") from None
    rows, done = (row for batch in file.iter_batches(16) for row in batch.to_pylist()), 0

    def take(number):
        nonlocal done
        try:
            before, done = done, number
            return next(islice(rows, number - before - 1, None))
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"the file is damaged here ({' '.join(str(error).split())})") from None
        except StopIteration:
            raise InputError("the file is damaged here, or before this row") from None

    with file:
        for number in range(1, file.metadata.num_rows + 1):
            yield number, partial(take, number)


def read_tar(path):
    """WebDataset: files beside each other whose names are the same up to the first dot of the last part are a row."""
    try:
        with tarfile.open(path, "r:") as tar:
            for key, files in groupby(_members(tar, path), lambda member: member[0]):
                yield key, partial(_sample, key, {ending: span for _, ending, span in files})
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} is not a tar, or damaged or cut short ({error}): check the file") from None


def _members(tar, path):
    while (member := tar.next()) is not None:
        tar.members.clear()  # else each of millions stays in memory
        name = member.name.rsplit("/", 1)[-1]
        if member.isreg() and not name.startswith("."):
            ending = name.partition(".")[2]
            key = member.name.removeprefix("./")[: -len(ending) - 1] if ending else member.name
            yield key, f".{ending.lower()}", Span(path, member.offset_data, member.size)
    tar.fileobj.seek(tar.offset)  # a damaged header is an end to tarfile
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _sample(key, files):
    values = _loaded(files[".json"].read()) if ".json" in files else {}
    if not isinstance(values, dict):
        raise InputError(f"the .json must hold an object, got {shown(values)}")
    if ".txt" in files:
        values["text"] = _decoded(files[".txt"].read(), f"{key}.txt")
    image = next((files[ending] for ending in files if ending in IMAGES), None)
    return {**values, "id": key, "image": image}


def _decoded(data, name):
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8") from None


def read_images(folder):
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and os.path.splitext(name)[1].lower() in IMAGES:
                path = Path(os.path.relpath(os.path.join(place, name), folder))
                yield path.as_posix(), partial(_captioned, folder, path)


def _raise(error):
    raise error


def _captioned(folder, path):
    name = path.with_suffix("").as_posix()
    text = path.with_suffix(".txt")
    return {"id": name, "text": _decoded(read_bytes(folder / text), text), "image": path.as_posix()}


READERS = {".json": read_json_rows, ".jsonl": read_json_rows, ".parquet": read_parquet, ".tar": read_tar}
