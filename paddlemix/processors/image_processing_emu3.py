# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pictures to the pixel tensors that the vision tokenizer takes, and back."""

import io
import json
import logging
import math
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from paddlemix.models.emu3.hub import at_revision, fetch
from paddlemix.utils import BatchFeature, InputError, read_json, write_atomically

CONFIG_NAME = "preprocessor_config.json"
# Pictures of more pixels than those of which Pillow warns are made smaller while they are read, to no less than KEPT.
LARGE, KEPT = 2**30 // 12, 2**24
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of pictures that come from anywhere: no reader that starts a program
# Pillow brings these greys and colours to 8 bits, but not the one of them that a PNG names as transparent.
TO_8_BITS = {
    "L;2": lambda grey: grey * 85,
    "L;4": lambda grey: grey * 17,
    "RGB;16B": lambda rgb: tuple(value >> 8 for value in rgb),
}
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else what it logs of a damaged file is printed


def smart_resize(height, width, factor=8, min_pixels=512 * 512, max_pixels=1024 * 1024):
    """The (height, width) nearest to a picture's own that the vision tokenizer takes.

    Both are multiples of `factor`; their product is brought between `min_pixels` and `max_pixels`, with the
    picture's shape kept, as nearly as the multiples allow. InputError: a side shorter than `factor`, a side
    more than 5 times the other, or `max_pixels` too small for any such size.
    """
    picture = f"a picture of {height}x{width} (height x width)"
    if min(height, width) < factor:
        raise InputError(f"{picture} is too small: give one of at least {factor} pixels a side")
    ratio = max(height, width) / min(height, width)
    if ratio > 5:
        raise InputError(
            f"{picture} is too narrow: one side is {ratio:.2f} times the other, and at most "
            "5 times is accepted; crop it or give it a border"
        )
    sides = [round(side / factor) for side in (height, width)]
    if math.prod(sides) * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = [math.floor(side / shrink / factor) for side in (height, width)]
    elif math.prod(sides) * factor**2 < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * enlarge / factor) for side in (height, width)]
    if min(sides) == 0:
        raise InputError(
            f"{picture} cannot have max_pixels={max_pixels} and sides of at least {factor}: give a larger max_pixels"
        )
    return sides[0] * factor, sides[1] * factor


def load_image(path):
    """The picture in a file, wholly read and turned upright; its mode is the file's.

    One of more than 89 million pixels comes made smaller by a whole number, in mode RGB or RGBA, so that no copies of
    all its pixels are in memory. InputError of one line: the file is missing, is a directory, holds no picture or a
    damaged one, or one of more than twice Pillow's MAX_IMAGE_PIXELS.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: there is no such file")
    if os.path.isdir(path):
        raise InputError(f"{path}: this is a directory; give the path of one picture in it")
    if not os.path.isfile(path):
        raise InputError(f"{path}: this is a pipe or a device; give the path of a picture's file")
    return _load(path, path)


def picture_of_bytes(data, name="the picture", most_pixels=None):
    """The picture that bytes of a PNG, JPEG, WebP, GIF or BMP hold, as `load_image` gives that of a file.

    InputError: they hold none, a damaged one, or one of more than `most_pixels`. `name` stands in the message.
    """
    return _load(name, data, most_pixels)


def _load(name, source, most_pixels=None):
    """`source`: a path, or the bytes of a picture, whose format is one of the usual then."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata, and many pixels
            return _read(source, most_pixels)
    except InputError as error:
        reason = str(error)
    except Image.DecompressionBombError as error:
        reason = f"too large a picture ({error}); scale it down first"
    except UnidentifiedImageError:
        reason = "not a picture that Pillow can read; give a PNG, JPEG or WebP file"
    except Exception as error:  # Pillow's readers check little: each fails where the wrong bytes lead it
        reason = f"cannot be read ({_words(error)}); it may be damaged or cut short, give another copy"
    raise InputError(" ".join(f"{name}: {reason}".split()))


def _words(error):
    return str(error) or type(error).__name__


def _read(source, most_pixels):
    try:
        return _read_open(source, most_pixels)
    except InputError:
        raise
    except Exception:
        # A PNG may have a damaged text or profile, or one larger than Pillow takes, and good pixels.
        without = _png_without_texts(source)
        if without is None:
            raise
    return _read_open(without, most_pixels)


def _png_without_texts(source):
    """A PNG's chunks, bytes, but for those of texts and colour profile; None where it has none of them."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        is_png = file.read(8) == b"\x89PNG\r\n\x1a\n" and file.seek(0, os.SEEK_END) < 2**30
        file.seek(8)
        data = file.read() if is_png else b""
    kept, start = [b"\x89PNG\r\n\x1a\n"], 0
    while (name := data[start + 4 : start + 8]).isalpha():  # a chunk: its length, its name, as many bytes, a checksum
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if name not in (b"iCCP", b"iTXt", b"tEXt", b"zTXt"):
            kept.append(data[start:end])
        start = end
    return None if sum(map(len, kept)) == 8 + min(start, len(data)) else b"".join(kept)


def _read_open(source, most_pixels):
    """A path or bytes -> the upright picture, or whatever Pillow raises."""
    file, formats = (io.BytesIO(source), FORMATS) if isinstance(source, bytes) else (source, None)
    with Image.open(file, formats=formats) as image:
        if most_pixels and image.width * image.height > most_pixels:
            raise InputError(
                f"{image.width} x {image.height} pixels are too many: at most {most_pixels} are taken; scale it down"
            )
        full_size = image.size
        if image.format == "PNG" and image.tile and "transparency" in image.info:
            to_8_bits = TO_8_BITS.get(image.tile[0][3], lambda same: same)
            image.info["transparency"] = to_8_bits(image.info["transparency"])
        if image.width * image.height > LARGE:
            shrink = _shrink(image)
            image.draft(None, (image.width // shrink, image.height // shrink))  # JPEG decodes to 1/2, 1/4 or 1/8
        image.load()
        if image.width * image.height > LARGE:
            image = _reduced(image)
        shrunk = image.size != full_size
        image = _upright(image)
        if shrunk:  # what a message names
            is_turned = (image.width > image.height) != (full_size[0] > full_size[1])
            image.info["full_size"] = full_size[::-1] if is_turned else full_size
        return image


def _shrink(image):
    return math.isqrt(image.width * image.height // KEPT)


def _reduced(image):
    """A large picture in mode RGB or RGBA (I and F keep theirs), each pixel the mean of a square: in bands of rows, so
    that no other copy of all pixels is made."""
    shrink = _shrink(image)
    if image.mode in ("I", "F"):
        return image.reduce(shrink)
    mode, convert = ("RGBA", _to_rgba) if _has_alpha(image) else ("RGB", _to_rgb)
    reduced = Image.new(mode, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
    for top in range(0, reduced.height, 64):
        bottom = min((top + 64) * shrink, image.height)
        band = image.crop((0, top * shrink, image.width, bottom))
        reduced.paste(convert(band).reduce(shrink), (0, top))
    reduced.info = {name: value for name, value in image.info.items() if name != "transparency"}  # it is in A
    return reduced


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two pictures of 8 bits and one size: PIL pictures or uint8 arrays."""
    error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else math.inf


def _upright(image):
    """The picture turned as its EXIF orientation says; damaged EXIF says nothing, and the picture is good."""
    image.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about the same damage
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # as above
            return image


def to_pil(image):
    """One PIL picture or uint8 array [H, W], [H, W, 3] or [3, H, W] -> an upright PIL picture.

    InputError: something else, or a PIL picture of a damaged file.
    """
    if isinstance(image, Image.Image):
        try:
            return _upright(image)
        except Exception as error:  # a file is read at the first use of its picture
            raise InputError(f"the picture cannot be read ({_words(error)}): give another copy") from None
    accepted = "give a PIL picture (load_image reads a file) or a uint8 array [H, W], [H, W, 3] or [3, H, W]"
    if not isinstance(image, np.ndarray):
        raise InputError(f"a picture cannot be a {type(image).__name__}: {accepted}")
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] == (3,)) or image.size == 0:
        raise InputError(f"a picture cannot be an array {list(image.shape)} of {image.dtype}: {accepted}")
    return Image.fromarray(np.ascontiguousarray(image))


def over_white(image):
    """A PIL picture of any mode -> (the picture in mode RGB, whether any of it was transparent).

    What is transparent is laid over white; the original drops the transparency and shows what is behind it.
    """
    if not _has_alpha(image):
        return _to_rgb(image), False
    image = _to_rgba(image)
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert("RGB"), False
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    return white, True


def _has_alpha(image):
    """Whether a picture has an alpha channel, or names colours that are transparent, as its mode takes them."""
    transparent = image.info.get("transparency")
    if image.mode == "P":
        return isinstance(transparent, (int, bytes))
    if image.mode == "RGB":
        return isinstance(transparent, tuple) and len(transparent) == 3
    if image.mode in ("1", "L", "I") or image.mode.startswith("I;16"):
        return isinstance(transparent, int)
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa")


def _to_rgba(image):
    """A picture that `_has_alpha` -> mode RGBA."""
    if image.mode.startswith("I"):  # Pillow knows no transparent grey of more than 8 bits
        rgba, opaque = _to_rgb(image).convert("RGBA"), np.asarray(image) != image.info["transparency"]
        rgba.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
        return rgba
    if image.mode == "La":  # of which Pillow makes LA alone
        image = image.convert("LA")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _to_rgb(image):
    """A picture without transparency, of any mode -> mode RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_grey_to_l(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey_to_l(image):
    """A grey of more than 8 bits (modes I;16, I and F) -> mode L; Pillow's own conversion clips at 255.

    I and F do not say what white is: it is taken for the smallest of 1 (F only), 255 and 65535 that no value
    exceeds.
    """
    values = np.asarray(image)
    highest = np.fmax.reduce(values, axis=None, initial=0)  # which leaves out NaN
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if highest <= white), None)
    if white is None:
        raise InputError(
            f"a picture of mode {image.mode} has the value {highest:g}, and 0 to 65535 are "
            "accepted: convert it to 8 bits first"
        )
    grey = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), 64):  # in bands: float64 takes much memory
        rows = np.nan_to_num(values[top : top + 64].astype(np.float64), nan=0.0)
        with np.errstate(invalid="ignore"):  # of a NaN that signals
            grey[top : top + 64] = np.rint(rows.clip(0) * (255 / white))
    return Image.fromarray(grey)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_count(value):
    return isinstance(value, int) and _is_number(value) and value > 0


def _is_per_channel(value):
    return _is_number(value) or isinstance(value, (list, tuple)) and [*map(_is_number, value)] == [True] * 3


def _is_divisor(value):
    return _is_per_channel(value) and bool(np.all(np.asarray(value, np.float32)))


FLAG = (lambda value: isinstance(value, bool), "true or false")
COUNT = (_is_count, "a whole number of at least 1")
SETTINGS = {  # name: (whether a value is good, what is accepted)
    "do_resize": FLAG,
    "resample": (
        lambda value: isinstance(value, int) and _is_number(value) and 0 <= value <= 5,
        "one of Pillow's filters 0 to 5, for example 3 (bicubic)",
    ),
    "do_rescale": FLAG,
    "rescale_factor": (lambda value: _is_number(value) and _is_divisor(value), "a number other than 0"),
    "do_normalize": FLAG,
    "image_mean": (_is_per_channel, "a number or a list of 3 numbers"),
    "image_std": (_is_divisor, "a number or a list of 3 numbers, none of them 0"),
    "do_convert_rgb": FLAG,
    "min_pixels": COUNT,
    "max_pixels": COUNT,
    "spatial_factor": COUNT,
    "question_max_pixels": (lambda value: value is None or _is_count(value), f"{COUNT[1]}, or null"),
}


class Emu3VisionVQImageProcessor:
    """Pictures <-> pixels: resized to sides that the vision tokenizer takes, values from 0..255 to -1..1.

    The arguments are the keys of `preprocessor_config.json`; keys that are not known here are kept and
    written back. `question_max_pixels` is the largest picture that the language model was made to answer
    questions about; None, as in the released checkpoints, is `max_pixels`. InputError: a value that is not accepted.
    """

    def __init__(
        self,
        /,
        do_resize=True,
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=None,
        image_std=None,
        do_convert_rgb=True,
        min_pixels=512 * 512,
        max_pixels=1024 * 1024,
        spatial_factor=8,
        question_max_pixels=None,
        **other_keys,
    ):
        self.do_resize = do_resize
        self.resample = resample
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = [0.5, 0.5, 0.5] if image_mean is None else image_mean
        self.image_std = [0.5, 0.5, 0.5] if image_std is None else image_std
        self.do_convert_rgb = do_convert_rgb
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.spatial_factor = spatial_factor
        self.question_max_pixels = question_max_pixels
        self.other_keys = other_keys
        for name, (is_good, accepted) in SETTINGS.items():
            if not is_good(getattr(self, name)):
                raise InputError(f"{name} cannot be {getattr(self, name)!r}: give {accepted}")
        if min_pixels > max_pixels:
            raise InputError(f"min_pixels={min_pixels} is above max_pixels={max_pixels}: change one of them")

    @property
    def size(self):
        """The bounds once more: the original writes them into its file under this name too."""
        return {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}

    @classmethod
    def from_pretrained(cls, name_or_dir, *, revision=None, **overrides):
        """The processor of a checkpoint, a directory, a hub name or "emu3-mini".

        `overrides` go before the file's values. `revision` is a hub name's; "NAME@REVISION" is the same.

        InputError: no such file, not JSON, or a value or an override's name that is not accepted.
        """
        name_or_dir = at_revision(name_or_dir, revision)
        path = fetch(name_or_dir, [CONFIG_NAME], part="vision_tokenizer") / CONFIG_NAME
        config = read_json(path)
        unknown = sorted(set(overrides) - set(SETTINGS) - set(config))
        if unknown:
            raise InputError(f"the image processor has no {', '.join(unknown)}: it has {', '.join(SETTINGS)}")
        try:
            return cls(**{**config, **overrides})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def save_pretrained(self, directory):
        """Writes `preprocessor_config.json` into `directory`, made if need be; whole or not at all."""
        config = {"image_processor_type": type(self).__name__, **self.other_keys}
        config.update({name: getattr(self, name) for name in SETTINGS}, size=self.size)
        if self.question_max_pixels is None:
            del config["question_max_pixels"]  # which the original does not know
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")

    def resized(self, height, width, max_pixels=None):
        """The (height, width) of a picture's pixels, of at most `max_pixels` where they are fewer than its own.

        InputError: as `smart_resize` raises it.
        """
        if not self.do_resize:
            return height, width
        most = min(self.max_pixels, max_pixels or self.max_pixels)
        return smart_resize(height, width, self.spatial_factor, min(self.min_pixels, most), most)

    def preprocess(self, images, return_tensors=None, *, size=None):
        """One picture or a list of them -> `pixel_values`, float32 [B, 3, H, W] in [-1, 1].

        A picture is of PIL, of any mode, or a uint8 array [H, W], [H, W, 3] or [3, H, W]. `return_tensors`:
        "np" or None for a numpy array, "pd" for a Paddle tensor. `size`: (height, width) in place of what `resized`
        gives. InputError: no picture, one that `smart_resize` refuses, or pictures that come to different sizes.
        """
        if return_tensors not in (None, "np", "pd"):
            raise InputError(f'return_tensors cannot be {return_tensors!r}: give "np", "pd" or None')
        if not isinstance(images, (list, tuple)):
            images = [images]
        if not images:
            raise InputError("there is no picture in the list: give at least one")
        pixels = [self._pixels(image, size) for image in images]
        shapes = sorted({f"{height}x{width}" for _, height, width in (one.shape for one in pixels)})
        if len(shapes) > 1:
            raise InputError(
                f"the pictures come to different sizes, {', '.join(shapes)} (height x width), "
                "but a batch has one: give one a call, or padding_image=True to Emu3Processor"
            )
        pixel_values = np.stack(pixels)
        if return_tensors == "pd":
            import paddle

            pixel_values = paddle.to_tensor(pixel_values)
        return BatchFeature(pixel_values=pixel_values)

    __call__ = preprocess

    def _pixels(self, image, size):
        """One picture -> float32 [3, H, W]."""
        image = to_pil(image)
        if self.do_convert_rgb:
            image, transparent = over_white(image)
            if transparent:
                logging.getLogger(__name__).warning("a picture's transparency is laid over white")
        elif image.mode != "RGB":
            raise InputError(f"the picture's mode is {image.mode}: with do_convert_rgb off, give RGB")
        if self.do_resize:
            height, width = size or self.resized(image.height, image.width)
            image = image.resize((width, height), self.resample)
        pixels = np.asarray(image)  # [H, W, 3]
        if self.do_rescale:  # in float64 and rounded once: the original's numbers to the last bit
            pixels = pixels.astype(np.float64) * self.rescale_factor
        pixels = pixels.astype(np.float32)
        if self.do_normalize:
            pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def postprocess(self, images, return_tensors="PIL.Image.Image"):
        """Pixels [B, 3, H, W] or [3, H, W] in [-1, 1] -> `pixel_values`: a list of B pictures.

        `images` is an array or a Paddle tensor of any float type; values outside the range are clipped.
        `return_tensors`: "PIL.Image.Image", or "np" for one uint8 array [B, H, W, 3]. InputError: another
        type or shape.
        """
        if return_tensors not in ("PIL.Image.Image", "np"):
            raise InputError(f'return_tensors cannot be {return_tensors!r}: give "PIL.Image.Image" or "np"')
        dtype, shape = getattr(images, "dtype", type(images).__name__), list(getattr(images, "shape", []))
        if "float" not in str(dtype) or len(shape) not in (3, 4) or shape[-3] != 3 or 0 in shape:
            raise InputError(
                f"pixels cannot be {shape} of {dtype}: give a float array or tensor in [-1, 1], "
                "[B, 3, H, W] or [3, H, W]"
            )
        if not isinstance(images, np.ndarray):
            images = images.astype("float32").numpy()  # numpy has no bfloat16, so Paddle widens it
        pixels = images.astype(np.float32).reshape(-1, *shape[-3:]).transpose(0, 2, 3, 1)
        if self.do_normalize:
            mean, std = np.asarray(self.image_mean), np.asarray(self.image_std)
            pixels = (pixels - (-mean / std).astype(np.float32)) / (1 / std).astype(np.float32)
        if self.do_rescale:
            pixels = pixels * np.float32(1 / self.rescale_factor)
        # Cut off, not rounded, as the original does. NaN, undefined as an integer, becomes 0: black.
        pixels = np.nan_to_num(pixels.clip(0, 255), nan=0.0).astype(np.uint8, order="C")
        if return_tensors == "PIL.Image.Image":
            pixels = [Image.fromarray(picture) for picture in pixels]
        return BatchFeature(pixel_values=pixels)
