# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The files of a command: pictures that it reads, results whole or not at all, the preview, the statistics."""

import json
import os
import time
from pathlib import Path

from paddlemix.machine import peak_memory
from paddlemix.results import save_picture
from paddlemix.utils import InputError, write_atomically

from .console import note, say

ROOT = Path(__file__).resolve().parents[2]


def load_pictures(paths, image_processor):
    """PIL pictures of files, in mode RGB, each of a shape that can be encoded; InputError names the file that is
    not."""
    from paddlemix.processors.image_processing_emu3 import load_image, over_white

    images = {}
    for path in dict.fromkeys(paths):  # one of several questions is read once
        image = load_image(find_file(path))
        try:
            images[path], transparent = over_white(image)
            image_processor.resized(image.height, image.width)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if transparent:
            note(f"{path}: its transparency is laid over white")
    return [images[path] for path in paths]


def find_file(path):
    """`path`, or the project's own file of that name where a command runs in another folder."""
    return path if Path(path).exists() or not (ROOT / path).exists() else ROOT / path


def frame_paths(folder):
    """The pictures of a folder in the order of their names, numbers in them counted as numbers."""
    import re

    from PIL import Image

    if not Path(folder).is_dir():
        raise InputError(f"--video_path {folder} is not there: give a folder of frames such as 000.png, or a video")
    suffixes = Image.registered_extensions()
    paths = [p for p in Path(folder).iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    if not paths:
        raise InputError(f"--video_path {folder} holds no picture: give a folder of frames such as 000.png, 001.png")
    # Every second piece is a number. To ask isdigit is not enough: "\u00b2" is a digit, and int does not take it.
    return sorted(paths, key=lambda p: [int(n) if i % 2 else n for i, n in enumerate(re.split(r"(\d+)", p.name))])


def refuse_to_overwrite(paths, inputs):
    """InputError where one of the paths to write is what one of the inputs is read from."""
    files = {file: given for given in inputs if (file := _file_of(given))}
    for path in paths:
        if given := files.get(_file_of(path)):
            raise InputError(f"{given} would be overwritten by the result {path}: give another --output_dir")


def _file_of(path):
    """(device, number) of the file that a path leads to; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Preview:
    """Writes a file again and again with the pictures so far, grey where nothing is drawn yet.

    It takes a tenth of the time at most: where decoding is slow, some rows go by without.
    """

    def __init__(self, path):
        self.path, self.next = path, 0.0

    def update(self, generation):
        """generation: the pipeline's Generation."""
        started = time.monotonic()
        if started < self.next:
            return
        self.next = float("inf")  # whoever interrupts this one wants no other
        try:
            images = generation.images()
        except (InputError, MemoryError):  # a card may hold the cache, but no picture's features beside it
            note("there is no memory for a preview: going on without")
            return
        if not self.show(images):
            return
        now = time.monotonic()
        self.next = now + 9 * (now - started)

    def show(self, images):
        """Write them; whether that went well. The pictures matter more than this one of them."""
        try:
            save_picture(next_to_each_other(images), self.path)
        except InputError:
            note(f"cannot write {self.path}: going on without a preview")
            return False
        return True


def next_to_each_other(images):
    """One PIL picture of several."""
    from PIL import Image

    both = Image.new("RGB", (sum(p.width for p in images), max(p.height for p in images)), "white")
    left = 0
    for image in images:
        both.paste(image, (left, 0))
        left += image.width
    return both


def side_by_side(reconstruction):
    """A picture of the pipeline's Reconstruction beside its original, under a line with the PSNR."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, line = reconstruction.image.width, reconstruction.image.height, 24
    both = Image.new("RGB", (2 * width + 8, height + line), "white")
    both.paste(reconstruction.original, (0, line))
    both.paste(reconstruction.image, (width + 8, line))
    draw, font = ImageDraw.Draw(both), ImageFont.load_default(14)
    draw.text((4, 3), "original", fill="black", font=font)
    draw.text((width + 12, 3), f"reconstruction, PSNR {reconstruction.psnr:.2f} dB", fill="black", font=font)
    return both


def write_stats(args, **stats):
    """--stats_json: seconds and counts as given, and the peak memory of the process, or of the card's."""
    if args.stats_json:
        stats = {k: round(v, 4) if isinstance(v, float) else v for k, v in stats.items()}
        stats["peak_memory_mb"] = round(peak_memory() / 2**20, 1)
        try:
            write_atomically(args.stats_json, json.dumps(stats, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {args.stats_json}: {error.strerror}") from None


def wrote(paths):
    say("wrote " + ", ".join(map(str, paths)))
