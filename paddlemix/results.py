# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The files of pictures that were drawn: names of their own, PNG with what is needed to draw them again."""

import re
from pathlib import Path

from .utils import InputError, replacing


def claim_paths(folder, stem, count, suffix, own=None):
    """The next `count` paths stem_N + suffix that no result has, finished or not, but for `own`: empty files, made
    here, so that no other command takes the same names."""
    names = [p.name for p in Path(folder).iterdir() if p != own]
    taken = [re.fullmatch(rf"{stem}_(\d+)\.(png|tokens\.npz)", name) for name in names]
    number, paths = max((int(m[1]) + 1 for m in taken if m), default=0), []
    while len(paths) < count:
        path = Path(folder) / f"{stem}_{number}{suffix}"
        number += 1
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        paths.append(path)
    return paths


def save_results(images, folder, texts, own=None):
    """Write pictures under names of their own; returns their paths. What cannot be written leaves no empty file."""
    paths, written = claim_paths(folder, "result", len(images), ".png", own), 0
    try:
        for path, image, text in zip(paths, images, texts, strict=True):
            save_picture(image, path, text)
            written += 1
    finally:
        for path in paths[written:]:
            path.unlink(missing_ok=True)
    return paths


def save_picture(image, path, text=None):
    """Write a PNG whole or not at all; `text` goes into its metadata."""
    try:
        with replacing(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=png_info(text or {}))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}: give another --output_dir") from None


def png_info(text):
    """A dict as a PNG's metadata, for Pillow's `save`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    return info
