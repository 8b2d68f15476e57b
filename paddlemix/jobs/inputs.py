# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The rows of files and folders, with their ids. A row is read when its turn comes; what is wrong with it is its
`error`, and the next one follows."""

import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from paddlemix.utils import InputError, check_utf_8, shown

from .formats import READERS, Span, first_bytes, read_images


@dataclass
class Row:
    """A row as it was written. Where `error` is set the values are not to be used."""

    source: str  # where it stands: "data/train.jsonl:17"
    folder: Path  # that paths in it start from
    id: str | None = None
    values: dict = field(default_factory=dict)
    error: str | None = None


def image_of(row, value):
    """The upright PIL image, mode RGB, that a value of a row names: a path, bytes, Hugging Face's {bytes, path}.

    InputError: something else, no such file, or not an image that can be read.
    """
    from paddlemix.processors.image_processing_emu3 import load_image, over_white, picture_of_bytes

    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Span):
        value = value.read()
    if isinstance(value, bytes):
        image = picture_of_bytes(value, "the image")
    elif isinstance(value, str) and value:
        image = load_image(row.folder / value)
    else:
        raise InputError(f"image must be a path or an image's bytes, got {shown(value)}")
    return over_white(image)[0]


def printable(text):
    """A text as Parquet takes it: UTF-8, and not without end."""
    return text[:1000].encode("utf-8", "backslashreplace").decode()


def text_of(name, value):
    """The value, a text that is not empty. InputError: it is anything else, or cannot be UTF-8."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {shown(value)}" if value is not None else f"{name} is missing")
    if not value.strip():
        raise InputError(f"{name} is empty")
    check_utf_8(name, value)
    return value


def first_given(values, *names):
    """The first of these values that is there and not null, as columns of a table are in rows without one; or None."""
    return next((values[name] for name in names if values.get(name) is not None), None)


class Source:
    """One file of rows, or a folder of images with their texts. What is read now are its rows' places alone.

    InputError: there is none, or it holds something else, or nothing.
    """

    def __init__(self, path, label):
        self.path, self.label, self.is_folder = path, label, path.is_dir()
        self.folder = path if self.is_folder else path.parent
        start = b"" if self.is_folder else first_bytes(path)
        self.reader = read_images if self.is_folder else READERS.get(path.suffix.lower())
        if self.reader is None:
            raise InputError(f"{path}: accepted are {', '.join(READERS)}, or a folder of images with .txt files")
        self.count, crc = 0, zlib.crc32(start)
        for place, _ in self.reader(path):
            self.count += 1
            crc = zlib.crc32(str(place).encode("utf-8", "surrogateescape"), crc)
        if not self.count:
            raise InputError(f"{path} holds no {'image' if self.is_folder else 'row'}: {_advice(path)}")
        size = "" if self.is_folder else f"{path.stat().st_size} bytes, "
        self.identity = printable(f"{path.name}: {size}{self.count} rows, {crc:08x}")

    def row(self, place, load, taken):
        """The Row at a place; its id joins those that are taken."""
        row = Row(printable(f"{self.path}{'/' if self.is_folder else ':'}{place}"), self.folder)
        try:
            values = load()
            if not isinstance(values, dict):
                raise InputError(f"a row must be a JSON object, got {shown(values)}")
            name = first_given(values, "id", "name")
            if name is None:
                name = f"{self.label}-{place}"
            elif self.is_folder and self.label:
                name = f"{self.label}/{name}"
            name = text_of("id", str(name) if type(name) is int else name)
            if name in taken:
                raise InputError(f"id {shown(name)} is doubled: a row before has it")
            taken.add(name)
            row.id, row.values = name, values
        except InputError as error:
            row.error = str(error)
        return row


def open_sources(paths):
    """The Source of each file and folder; of a folder of .parquet or .tar files that of each of them."""
    files = [file for path in paths for file in _files(Path(path))]
    twice = [file for file, times in Counter(map(os.path.realpath, files)).items() if times > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice: give it once")
    names = {file: file.name if file.is_dir() else file.stem for file in files}
    times = Counter(names.values())  # rows without an id are named after their file, and no two alike
    labels = {file: name if times[name] == 1 else file.with_suffix("").as_posix() for file, name in names.items()}
    return [Source(file, "" if file.is_dir() and len(files) == 1 else labels[file]) for file in files]


def read_rows(sources, skip=0, taken=()):
    """The Row of each, in order, but for the first `skip`. taken: their ids, a set, which the others' join."""
    taken = taken if isinstance(taken, set) else set(taken)
    for source in sources:
        for place, load in islice(source.reader(source.path), skip, None):
            yield source.row(place, load, taken)
        skip = max(0, skip - source.count)


def _files(path):
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.iterdir() if p.suffix.lower() in (".parquet", ".tar") and p.name[0] != ".") or [path]


def _advice(path):
    lists = sorted(p for p in path.glob("*") if p.suffix.lower() in READERS) if path.is_dir() else []
    return f"give the name of the list, such as {lists[0]}" if lists else "check the path"
