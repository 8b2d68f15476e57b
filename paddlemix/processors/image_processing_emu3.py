# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pictures to the pixel tensors that the vision tokenizer takes, and back."""

import json
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from paddlemix.models.emu3.hub import at_revision, fetch
from paddlemix.utils import BatchFeature, InputError, write_atomically

CONFIG_NAME = "preprocessor_config.json"
# What Pillow's readers raise on damaged files: they check little, and fail where the wrong bytes lead them.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


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

    InputError of one line: the file is missing, is a directory, holds no picture or a damaged one, or one of
    more pixels than Pillow's limit against decompression bombs.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: there is no such file")
    if os.path.isdir(path):
        raise InputError(f"{path}: this is a directory; give the path of one picture in it")
    if not os.path.isfile(path):
        raise InputError(f"{path}: this is a pipe or a device; give the path of a picture's file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # damaged metadata: of no interest here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _upright(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        reason = f"too large a picture ({error}); scale it down first"
    except UnidentifiedImageError:
        reason = "not a picture that Pillow can read; give a PNG, JPEG or WebP file"
    except DAMAGE as error:
        reason = f"cannot be read ({error}); it may be damaged or cut short, give another copy"
    raise InputError(" ".join(f"{path}: {reason}".split()))


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two pictures of 8 bits and one size: PIL pictures or uint8 arrays."""
    error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else math.inf


def _upright(image):
    """The picture turned as its EXIF orientation says; damaged EXIF says nothing, and the picture is good."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE:
        return image


def _to_pil(image):
    """One PIL picture or uint8 array [H, W], [H, W, 3] or [3, H, W] -> an upright PIL picture."""
    if isinstance(image, Image.Image):
        return _upright(image)
    accepted = "give a PIL picture (load_image reads a file) or a uint8 array [H, W], [H, W, 3] or [3, H, W]"
    if not isinstance(image, np.ndarray):
        raise InputError(f"a picture cannot be a {type(image).__name__}: {accepted}")
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] == (3,)) or image.size == 0:
        raise InputError(f"a picture cannot be an array {list(image.shape)} of {image.dtype}: {accepted}")
    return Image.fromarray(np.ascontiguousarray(image))


def _deep_grey_to_l(image):
    """A grey of more than 8 bits (modes I;16, I and F) -> mode L; Pillow's own conversion clips at 255.

    I and F do not say what white is: it is taken for the smallest of 1 (F only), 255 and 65535 that no value
    exceeds.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0)
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if values.max(initial=0) <= white), None)
    if white is None:
        raise InputError(
            f"a picture of mode {image.mode} has the value {values.max():g}, and 0 to 65535 are "
            "accepted: convert it to 8 bits first"
        )
    return Image.fromarray(np.rint(values.clip(0) * (255 / white)).astype(np.uint8))


def _to_rgb(image):
    """A PIL picture of any mode -> mode RGB. Transparency is dropped, not blended, as the original does."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_grey_to_l(image)
    # Straight to RGB, Pillow warns about a transparent palette and does not know premultiplied grey.
    stop_over = {"P": "RGBA", "La": "LA"}.get(image.mode, image.mode)
    return image.convert(stop_over).convert("RGB")


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
}


class Emu3VisionVQImageProcessor:
    """Pictures <-> pixels: resized to sides that the vision tokenizer takes, values from 0..255 to -1..1.

    The arguments are the keys of `preprocessor_config.json`; keys that are not known here are kept and
    written back. InputError: a value that is not accepted.
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
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
            raise InputError(f"{path}: not a JSON file ({error}); download it again") from None
        if not isinstance(config, dict):
            raise InputError(f"{path}: not a JSON object but a {type(config).__name__}; download it again")
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
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")

    def preprocess(self, images, return_tensors=None):
        """One picture or a list of them -> `pixel_values`, float32 [B, 3, H, W] in [-1, 1].

        A picture is of PIL, of any mode, or a uint8 array [H, W], [H, W, 3] or [3, H, W]. `return_tensors`:
        "np" or None for a numpy array, "pd" for a Paddle tensor. InputError: no picture, one that
        `smart_resize` refuses, or pictures that come to different sizes.
        """
        if return_tensors not in (None, "np", "pd"):
            raise InputError(f'return_tensors cannot be {return_tensors!r}: give "np", "pd" or None')
        if not isinstance(images, (list, tuple)):
            images = [images]
        if not images:
            raise InputError("there is no picture in the list: give at least one")
        pixels = [self._pixels(image) for image in images]
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

    def _pixels(self, image):
        """One picture -> float32 [3, H, W]."""
        image = _to_pil(image)
        if self.do_convert_rgb:
            image = _to_rgb(image)
        elif image.mode != "RGB":
            raise InputError(f"the picture's mode is {image.mode}: with do_convert_rgb off, give RGB")
        if self.do_resize:
            height, width = smart_resize(
                image.height, image.width, self.spatial_factor, self.min_pixels, self.max_pixels
            )
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
