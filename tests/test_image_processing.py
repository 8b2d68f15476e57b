# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pictures to pixels and back: the original's numbers, every kind of picture, and every mistake of a user."""

import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import paddlemix
from paddlemix.processors.image_processing_emu3 import (
    Emu3VisionVQImageProcessor,
    load_image,
    picture_of_bytes,
    psnr,
    smart_resize,
)
from paddlemix.utils import InputError

GOLDEN = Path(__file__).parent / "golden"
DEMO = Path(paddlemix.__file__).parent / "demo_images" / "emu3_demo.png"
SIZES = json.loads((GOLDEN / "smart_resize.json").read_text())
WIDTH, HEIGHT = 48, 32


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "processor.npz")


@pytest.fixture
def small():
    """The processor that the golden pixels were made with."""
    return Emu3VisionVQImageProcessor(min_pixels=64 * 64, max_pixels=112 * 112)


@pytest.fixture
def same_size():
    """A processor that does not resize, so that each pixel can be told beforehand."""
    return Emu3VisionVQImageProcessor(do_resize=False)


@pytest.fixture
def colours():
    """A picture of 32 x 48, no two of its corners alike: uint8 [H, W, 3]."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 8, columns * 5, (rows + columns) * 3], axis=-1).astype(np.uint8)


def to_pixels(picture):
    """What the definition says: 0..255 becomes -1..1; [H, W, 3] -> [3, H, W]."""
    return (picture / 127.5 - 1).transpose(2, 0, 1)


# Sizes


def test_sizes_are_the_originals():
    assert len(SIZES) > 100
    for case in SIZES:
        arguments = {name: value for name, value in case.items() if name != "out"}
        if case["out"] is None:
            with pytest.raises(InputError):
                smart_resize(**arguments)
        else:
            assert list(smart_resize(**arguments)) == case["out"], arguments


def test_a_refused_size_is_explained():
    with pytest.raises(InputError, match=r"7x100 .* too small: give one of at least 8 pixels a side"):
        smart_resize(7, 100)
    with pytest.raises(InputError, match=r"100x501 .* 5\.01 times .* crop it"):
        smart_resize(100, 501)
    with pytest.raises(InputError, match="give a larger max_pixels"):
        smart_resize(40, 8, min_pixels=1, max_pixels=64)


# Pixels


@pytest.mark.parametrize(
    "picture, pixels",
    [
        ("image0", "pixels0"),
        ("image1", "pixels1"),
        ("image2", "pixels2"),
        ("gray", "gray_pixels"),
        ("rgba", "rgba_pixels"),
    ],
)
def test_pixels_are_the_originals(golden, small, picture, pixels):
    pixel_values = small(Image.fromarray(golden[picture])).pixel_values
    assert pixel_values.dtype == np.float32 and pixel_values.flags.c_contiguous
    np.testing.assert_array_equal(pixel_values, golden[pixels])


def test_arrays_are_pictures_too(golden, small):
    image = golden["image0"]  # [H, W, 3]
    for same in (image, image.transpose(2, 0, 1), [image], (Image.fromarray(image),)):
        np.testing.assert_array_equal(small.preprocess(same).pixel_values, golden["pixels0"])
    np.testing.assert_array_equal(small(golden["gray"]).pixel_values, golden["gray_pixels"])


def test_a_batch_and_paddle_tensors(golden, small):
    two = small([Image.fromarray(golden["image1"]), golden["image1"]], return_tensors="pd")
    assert two["pixel_values"].shape == [2, 3, 96, 128]
    np.testing.assert_array_equal(two.pixel_values.numpy(), np.concatenate([golden["pixels1"]] * 2))
    assert isinstance(small(golden["gray"], return_tensors="np").pixel_values, np.ndarray)


def test_the_demo_picture_is_taken_at_its_own_size():
    pixel_values = Emu3VisionVQImageProcessor()(load_image(DEMO)).pixel_values
    assert pixel_values.shape == (1, 3, 424, 640)
    assert DEMO.stat().st_size < 600_000


# Every kind of picture


def in_mode(mode, grey):
    """A grey picture, uint8 [H, W], as a PIL picture of any mode."""
    if mode.startswith("I;16"):
        deep = (grey.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, grey.shape[::-1], deep.tobytes())
    image = Image.fromarray(grey)
    if mode == "LAB":
        neutral = Image.new("L", image.size, 128)
        return Image.merge("LAB", (image, neutral, neutral))
    straight = {"La": "LA", "RGBa": "RGBA", "HSV": "RGB"}.get(mode, mode)
    return image.convert(straight).convert(mode)


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
        "I",
        "F",
        "I;16",
        "I;16L",
        "I;16B",
    ],
)
def test_every_mode_of_pillow(same_size, mode):
    grey = np.repeat([[0, 64, 128, 255]], 16, axis=0).repeat(16, axis=1).astype(np.uint8)  # four bars
    if mode == "1":
        grey[grey < 255] = 0
    image = in_mode(mode, grey)
    assert image.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = same_size(image).pixel_values[0]
    tolerance = 10 / 127.5 if mode == "LAB" else 1e-6  # lightness is only nearly proportional to grey
    np.testing.assert_allclose(pixels, to_pixels(np.stack([grey] * 3, axis=-1)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_colours_stay(same_size, mode):
    image = Image.new("RGB", (WIDTH, HEIGHT), (200, 60, 20))
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    pixels = same_size(image).pixel_values[0]
    expected = np.broadcast_to([[[200 / 127.5 - 1]], [[60 / 127.5 - 1]], [[20 / 127.5 - 1]]], pixels.shape)
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=3 / 127.5)


# Transparency lies over white


def laid_over_white(colours, alpha):
    """What the definition says: uint8 [H, W, 3] and alpha [H, W] of 0 to 1."""
    return colours * alpha[..., None] + 255 * (1 - alpha[..., None])


def assert_over_white(processor, image, expected, caplog, tolerance=1):
    """Within a grey level, once said and without a warning of Pillow's."""
    caplog.clear()
    caplog.set_level("WARNING")  # which a command may have switched off
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = processor(image).pixel_values[0]
    np.testing.assert_allclose(pixels, to_pixels(expected), rtol=0, atol=tolerance / 127.5)
    assert [record.message for record in caplog.records] == ["a picture's transparency is laid over white"]


def png(depth, colour_type, rows, width, *before, after=()):
    """A PNG's bytes: rows of bytes as the format packs them, and chunks (name, content) before and after the pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in ((b"IHDR", header), *before, (b"IDAT", pixels), *after, (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        parts.append(struct.pack(">I", len(content)) + name + content + checksum)
    return b"".join(parts)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_an_alpha_channel(same_size, colours, mode, caplog):
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).round().astype(np.uint8).reshape(HEIGHT, WIDTH)
    plain = colours if "RGB" in mode else np.full_like(colours, 70)
    rgba = Image.fromarray(np.dstack([plain, alpha]))
    if mode == "PA":
        image = Image.merge("PA", [Image.new("L", rgba.size, 1), rgba.getchannel("A")])
        image.putpalette([9, 9, 9, 70, 70, 70])
    else:
        image = rgba if mode[:3] == "RGB" else rgba.convert("LA")
        image = image if mode in ("RGBA", "LA") else image.convert(mode)
    assert image.mode == mode
    assert_over_white(same_size, image, laid_over_white(plain, alpha / 255), caplog, 2 if mode[-1] == "a" else 1)


def test_a_transparent_palette(same_size, colours, tmp_path, caplog):
    image = Image.fromarray(colours).quantize(16)
    palette, indices = np.array(image.getpalette()[: 16 * 3], np.uint8).reshape(16, 3), np.asarray(image)
    for transparency, alpha in ((bytes(range(0, 256, 16)), np.arange(0, 256, 16) / 255), (3, np.arange(16) != 3)):
        image.save(tmp_path / "clear.png", transparency=transparency)
        expected = laid_over_white(palette[indices], alpha[indices])
        assert_over_white(same_size, load_image(tmp_path / "clear.png"), expected, caplog)


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "clear", "colours"),
    [  # four pixels of a PNG, of which the second has the colour that tRNS names; what the four are over white
        (1, 0, b"\xa0", b"\0\0", [255, 255, 255, 255]),
        (2, 0, b"\x1b", b"\0\1", [0, 255, 170, 255]),
        (4, 0, b"\x0a\x5f", b"\0\x0a", [0, 255, 85, 255]),
        (8, 0, b"\0\x50\x51\xff", b"\0\x50", [0, 255, 81, 255]),
        (16, 0, b"\0\0\x50\x50\x50\x51\xff\xff", b"\x50\x50", [0, 255, 80, 255]),
        (8, 2, b"\1\1\1\2\2\2\2\3\2\7\7\7", b"\0\2\0\2\0\2", [1, 255, (2, 3, 2), 7]),
        (16, 2, b"\1\0" * 3 + b"\2\x50" * 3 + b"\3\0" * 3 + b"\x50\x50" * 3, b"\2\x50" * 3, [1, 255, 3, 80]),
        (16, 6, b"\x40\0" * 3 + b"\xff\xff" + b"\x50\0" * 3 + b"\0\0" + b"\x60\0" * 3 + b"\xff\xff" + b"\0" * 8,
         None, [64, 255, 96, 255]),
    ],
)  # fmt: skip
def test_a_transparent_colour_of_a_png(same_size, depth, colour_type, row, clear, colours, tmp_path, caplog):
    (tmp_path / "clear.png").write_bytes(png(depth, colour_type, [row], 4, *([(b"tRNS", clear)] if clear else [])))
    expected = np.array([np.broadcast_to(colour, 3) for colour in colours], np.uint8)[None]
    assert_over_white(same_size, load_image(tmp_path / "clear.png"), expected, caplog)


def test_an_opaque_picture_is_as_it_is(same_size, colours, caplog):
    for image in (Image.fromarray(colours).convert("RGBA"), Image.fromarray(colours).quantize(8).convert("PA")):
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_allclose(same_size(image).pixel_values[0], to_pixels(expected), rtol=0, atol=1e-6)
    assert not caplog.records


def test_sixteen_bit_greys_are_scaled_not_clipped(same_size, tmp_path):
    deep = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    half_a_level = 0.5 / 127.5 + 1e-6
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        pixels = same_size(load_image(tmp_path / name)).pixel_values[0, 0]
        np.testing.assert_allclose(pixels, deep / 32767.5 - 1, rtol=0, atol=half_a_level)
    # Mode I, in which older Pillows open such files, and float greys up to 1.
    for image in (Image.fromarray(deep.astype(np.int32)), Image.fromarray((deep / 65535).astype(np.float32))):
        pixels = same_size(image).pixel_values[0, 0]
        np.testing.assert_allclose(pixels, deep / 32767.5 - 1, rtol=0, atol=half_a_level)
    with pytest.raises(InputError, match="0 to 65535 are accepted"):
        same_size(Image.new("I", (WIDTH, HEIGHT), 70000))


# How a camera stores an upright picture under each EXIF orientation: where its first row and column lie.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(same_size, colours, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](colours))).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(path)), colours)
    for image in (Image.open(path), load_image(path)):  # as it is stored, and already turned: turned once
        np.testing.assert_allclose(same_size(image).pixel_values[0], to_pixels(colours), rtol=0, atol=1e-6)


def test_damaged_exif_does_not_spoil_a_picture(colours, tmp_path):
    Image.fromarray(colours).save(tmp_path / "odd.png", exif=b"Exif\0\0garbage")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "odd.png")), colours)


# Pixels to pictures


def test_pictures_are_the_originals(golden, small):
    array = small.postprocess(golden["post_in"], return_tensors="np").pixel_values
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, golden["post_out"])
    pictures = small.postprocess(golden["post_in"]).pixel_values
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (24, 16))] * 2
    np.testing.assert_array_equal(np.stack(pictures), golden["post_out"])
    one = small.postprocess(golden["post_in"][0])["pixel_values"]
    assert len(one) == 1
    np.testing.assert_array_equal(one[0], golden["post_out"][0])


def test_values_that_are_no_colours(small):
    pixels = np.zeros((3, 1, 4), np.float32)
    pixels[0, 0] = np.nan, np.inf, -np.inf, 1e30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = small.postprocess(pixels, return_tensors="np").pixel_values
    assert array[0, 0, :, 0].tolist() == [0, 255, 0, 255]
    assert (array[..., 1:] == 127).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_paddle_tensors_become_pictures(small, dtype):
    import paddle

    tensor = paddle.to_tensor([-1.0, 0.0, 1.0]).reshape([3, 1, 1]).expand([2, 3, 8, 8]).astype(dtype)
    array = small.postprocess(tensor, return_tensors="np").pixel_values
    np.testing.assert_array_equal(array, np.broadcast_to(np.uint8([0, 127, 255]), (2, 8, 8, 3)))


def test_other_means_and_scales_are_undone(colours):
    processor = Emu3VisionVQImageProcessor(do_resize=False, image_mean=[0.4, 0.5, 0.6], image_std=0.25)
    pixels = processor(colours).pixel_values
    np.testing.assert_allclose(pixels[0, 0], (colours[..., 0] / 255 - 0.4) / 0.25, rtol=0, atol=1e-5)
    restored = processor.postprocess(pixels, return_tensors="np").pixel_values[0]
    assert np.abs(restored.astype(int) - colours).max() <= 1  # cut off, as the original does


# Mistakes


@pytest.mark.parametrize(
    "images, message",
    [
        ([], "no picture in the list"),
        ("cat.png", "cannot be a str: .*load_image"),
        (np.zeros((32, 32, 3), np.float32), r"array \[32, 32, 3\] of float32"),
        (np.zeros((32, 32, 4), np.uint8), r"array \[32, 32, 4\] of uint8"),
        (np.zeros((2, 32, 32, 3), np.uint8), r"array \[2, 32, 32, 3\] of uint8"),
        (np.zeros((0, 32), np.uint8), r"array \[0, 32\]"),
        (Image.new("RGB", (600, 100)), "6.00 times the other"),
        (Image.new("I", (0, 0)), "too small"),
    ],
)
def test_what_is_no_picture_is_refused(small, images, message):
    with pytest.raises(InputError, match=message):
        small(images)


def test_pictures_of_different_sizes_are_refused(golden, small):
    with pytest.raises(InputError, match=r"72x88, 96x128 .* one a call, or padding_image"):
        small([golden["image0"], golden["image1"]])


def test_other_return_tensors_are_refused(golden, small):
    with pytest.raises(InputError, match='\'pt\': give "np", "pd" or None'):
        small(golden["gray"], return_tensors="pt")
    with pytest.raises(InputError, match='give "PIL.Image.Image" or "np"'):
        small.postprocess(golden["post_in"], return_tensors="pt")


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((1, 1, 3, 8, 8), np.float32),
        np.zeros((0, 3, 8, 8), np.float32),
        [0.0, 1.0],
    ],
)
def test_what_are_no_pixels_is_refused(small, pixels):
    with pytest.raises(InputError, match="give a float array or tensor"):
        small.postprocess(pixels)


@pytest.mark.parametrize(
    "setting",
    [
        {"min_pixels": 0},
        {"max_pixels": "big"},
        {"question_max_pixels": 0},
        {"spatial_factor": 8.0},
        {"resample": 9},
        {"do_resize": "yes"},
        {"rescale_factor": float("nan")},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0, 0.5]},
        {"min_pixels": 10_000, "max_pixels": 9_999},
    ],
)
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        Emu3VisionVQImageProcessor(**setting)


def test_without_conversion_only_rgb_is_taken(colours):
    processor = Emu3VisionVQImageProcessor(do_resize=False, do_convert_rgb=False)
    assert processor(colours).pixel_values.shape == (1, 3, HEIGHT, WIDTH)
    with pytest.raises(InputError, match="mode is L"):
        processor(colours[..., 0])


# The settings file


RELEASED = {  # as it stands in the released checkpoint
    "auto_map": {"AutoImageProcessor": "image_processing_emu3visionvq.Emu3VisionVQImageProcessor"},
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Emu3VisionVQImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_pixels": 1048576,
    "min_pixels": 262144,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"max_pixels": 1048576, "min_pixels": 262144},
    "spatial_factor": 8,
}


def write_settings(directory, text):
    (directory / "preprocessor_config.json").write_text(text)
    return directory


def test_settings_survive_a_round_trip(tmp_path):
    size = {"max_pixels": 1048576, "min_pixels": 4096}
    settings = {**RELEASED, **size, "size": size, "new": [1], "question_max_pixels": 8192}
    processor = Emu3VisionVQImageProcessor.from_pretrained(write_settings(tmp_path, json.dumps(settings)))
    assert processor.min_pixels == 4096
    processor.save_pretrained(tmp_path / "deep" / "er")
    (written,) = (tmp_path / "deep" / "er").iterdir()
    assert written.name == "preprocessor_config.json"
    assert written.read_text() == json.dumps(settings, indent=2, sort_keys=True) + "\n"


def test_a_processor_of_ones_own_is_written_like_the_released_one(tmp_path):
    Emu3VisionVQImageProcessor().save_pretrained(tmp_path)
    expected = {name: value for name, value in RELEASED.items() if name != "auto_map"}
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == expected


def test_overrides_go_before_the_file(tmp_path):
    write_settings(tmp_path, json.dumps(RELEASED))
    processor = Emu3VisionVQImageProcessor.from_pretrained(tmp_path, min_pixels=64, max_pixels=128 * 128)
    assert processor.size == {"min_pixels": 64, "max_pixels": 128 * 128}
    with pytest.raises(InputError, match="has no min_pixel: it has do_resize"):
        Emu3VisionVQImageProcessor.from_pretrained(tmp_path, min_pixel=64)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"resample": "bicubic"}', '{"min_pixels": 2000000}', '{"rescale_factor": 0}']
)
def test_a_bad_settings_file_is_named(tmp_path, text):
    with pytest.raises(InputError, match="preprocessor_config.json(: | is not valid JSON| must hold one JSON object)"):
        Emu3VisionVQImageProcessor.from_pretrained(write_settings(tmp_path, text))


def test_a_missing_settings_file_is_named(tmp_path):
    with pytest.raises(InputError, match="preprocessor_config.json"):
        Emu3VisionVQImageProcessor.from_pretrained(tmp_path)


# Files that are no pictures


def refusal(path):
    with pytest.raises(InputError) as caught:
        load_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_load_image_refuses_what_it_cannot_read(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.png")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "text.png").write_text("a cat\n")
    assert "not a picture that Pillow can read" in refusal(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    assert "not a picture that Pillow can read" in refusal(tmp_path / "empty.png")


def test_a_picture_of_bytes(colours):
    """Only of the usual formats: some of Pillow's readers start other programs."""
    def saved(format, **options):
        file = io.BytesIO()
        Image.fromarray(colours).save(file, format, **options)
        return file.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    assert picture_of_bytes(saved("JPEG", exif=exif)).size == (HEIGHT, WIDTH)
    for format in ("PNG", "BMP"):
        np.testing.assert_array_equal(np.asarray(picture_of_bytes(saved(format))), colours)
    pixels = HEIGHT * WIDTH
    assert picture_of_bytes(saved("PNG"), most_pixels=pixels).size == (WIDTH, HEIGHT)
    for data, most, words in (
        (saved("PNG"), pixels - 1, f"image 1: 48 x 32 pixels are too many: at most {pixels - 1}"),
        (saved("EPS"), None, "image 1: not a picture"), (saved("TIFF"), None, "image 1: not a picture"),
        (b"", None, "image 1: not a picture"), (saved("PNG")[:-30], None, "image 1: cannot be read"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            picture_of_bytes(data, "image 1", most)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_load_image_refuses_a_picture_cut_short(tmp_path, format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "picture"
    Image.fromarray(noise).save(path, format)
    whole = path.read_bytes()
    assert load_image(path).size == (64, 64)
    path.write_bytes(whole[: len(whole) // 2])
    refusal(path)


def test_load_image_refuses_a_decompression_bomb(tmp_path, colours, monkeypatch):
    """Pillow warns above its limit, and raises above its double."""
    Image.fromarray(colours).save(tmp_path / "bomb.png")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "bomb.png")), colours)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 700)
    assert f"{HEIGHT * WIDTH} pixels" in refusal(tmp_path / "bomb.png")


def test_whatever_pillow_raises_is_damage(tmp_path, colours):
    """An assertion in FTEX, and bytes of each format exchanged: a picture, or one line."""
    ftex = b"FTEX" + struct.pack("<10i", 0, 64, 64, 1, 2, 0, 0, 0, 0, 0)  # two formats
    (tmp_path / "ftex.png").write_bytes(ftex)
    assert "cannot be read (AssertionError)" in refusal(tmp_path / "ftex.png")
    rng, refused = np.random.default_rng(0), 0
    for format in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "TGA", "PCX", "DDS", "ICO", "SGI", "WEBP", "JPEG2000", "QOI"):
        file = io.BytesIO()
        try:
            Image.fromarray(colours).save(file, format)
        except (KeyError, OSError):  # which this Pillow does not write
            continue
        for _ in range(25):
            data = bytearray(file.getvalue())
            for place in rng.integers(0, min(len(data), 150), 3):
                data[place] = rng.integers(256)
            (tmp_path / "odd").write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])
            try:
                load_image(tmp_path / "odd")
            except InputError as error:
                refused += "\n" not in str(error)
    assert refused > 50


def test_a_damaged_picture_prints_nothing(tmp_path, colours):
    """Pillow logs an error of 99 samples a pixel beside raising."""
    Image.fromarray(colours).save(tmp_path / "odd.tif")
    samples = struct.pack("<HHI", 277, 3, 1)
    before, after = (tmp_path / "odd.tif").read_bytes().split(samples + b"\3")
    (tmp_path / "odd.tif").write_bytes(before + samples + b"\x63" + after)
    program = "import sys; from paddlemix.processors.image_processing_emu3 import load_image; load_image(sys.argv[1])"
    run = [sys.executable, "-c", program, tmp_path / "odd.tif"]
    error = subprocess.run(run, capture_output=True, text=True, check=False).stderr
    assert "InputError: " in error and "More samples" not in error


def test_a_damaged_file_of_a_lazy_picture_is_refused(tmp_path, same_size):
    Image.effect_noise((64, 64), 60).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(InputError, match="the picture cannot be read"):
        same_size(image)


# Good pixels beside odd texts


LONG, SHORT = zlib.compress(b"x" * (2 << 20)), zlib.compress(b"x" * (1 << 20))
TEXTS = {
    "profile": [(b"iCCP", b"name\0\0" + LONG)],
    "text": [(b"zTXt", b"key\0\0" + LONG)],
    "international text": [(b"iTXt", b"key\0\1\0\0\0" + LONG)],
    "many texts": [(b"zTXt", b"key%d\0\0" % i + SHORT) for i in range(66)],
    "damaged profile": [(b"iCCP", b"name\0\7" + LONG)],
    "damaged text": [(b"zTXt", b"key\0\7" + LONG)],
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_and_profiles_do_not_spoil_a_picture(tmp_path, kind):
    """Larger than Pillow takes by itself, or damaged, before the pixels and after them; its limits stay."""
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    for before, after in ((TEXTS[kind], []), ([], TEXTS[kind])):
        (tmp_path / "a.png").write_bytes(png(8, 0, [b"\1\2\3"] * 2, 3, *before, after=after))
        assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [[1, 2, 3]] * 2
        cut = png(8, 0, [b"\1\2\3"], 3, *before, after=after).replace(b"IDAT", b"IDAX")
        (tmp_path / "a.png").write_bytes(cut)
        refusal(tmp_path / "a.png")
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


# Large pictures are made smaller while they are read


@pytest.fixture
def large(monkeypatch):
    """Pictures of 48 x 32 count as large, and become 24 x 16."""
    monkeypatch.setattr("paddlemix.processors.image_processing_emu3.LARGE", 1000)
    monkeypatch.setattr("paddlemix.processors.image_processing_emu3.KEPT", 300)


def means(picture):
    """uint8 [H, W, ...] -> the mean of each 2 x 2 pixels."""
    height, width = (side // 2 for side in picture.shape[:2])
    return picture.reshape(height, 2, width, 2, -1).mean((1, 3))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGB", "png"), ("RGBA", "png"), ("I;16", "png"),
        ("I;16B", "tif"), ("I", "tif"), ("F", "tif"), ("CMYK", "tif"), ("LAB", "tif"), ("RGB", "jpg"), ("CMYK", "jpg"),
    ],
)  # fmt: skip
def test_a_large_picture_of_every_mode(same_size, large, tmp_path, mode, suffix):
    grey = np.repeat(np.arange(WIDTH, dtype=np.uint8)[None] // 8 * 50, HEIGHT, axis=0)
    if mode == "1":
        grey = (grey > 100).astype(np.uint8) * 255
    path = tmp_path / f"large.{suffix}"
    in_mode(mode, grey).save(path)
    pixels = same_size(load_image(path)).pixel_values[0]
    expected = to_pixels(np.repeat(means(grey), 3, axis=2))
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=(10 if mode == "LAB" or suffix == "jpg" else 1) / 127.5)


def test_a_large_transparent_picture(same_size, large, colours, tmp_path, caplog):
    """Its bands have a common palette and a common transparency, and each pixel the mean of what lies over white."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    alpha = ((rows + columns) % 2 * 255).astype(np.uint8)
    Image.fromarray(np.dstack([colours, alpha])).save(tmp_path / "a.png")
    expected = means(laid_over_white(colours, alpha / 255).astype(np.uint8))
    assert_over_white(same_size, load_image(tmp_path / "a.png"), expected, caplog, 2)
    (tmp_path / "a.png").write_bytes(
        png(8, 3, [bytes([i % 2 for i in range(48)])] * 32, 48, (b"PLTE", b"\0\0\0\x40\x40\x40"), (b"tRNS", b"\0"))
    )
    assert_over_white(same_size, load_image(tmp_path / "a.png"), np.full([16, 24, 3], (255 + 64) / 2), caplog, 2)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_large_picture_is_upright(same_size, large, tmp_path, orientation, suffix):
    picture = np.zeros([HEIGHT, WIDTH, 3], np.uint8)
    picture[:16, :16], picture[:16, 16:] = (250, 250, 250), (128, 128, 128)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](picture))).save(path, exif=exif)
    image = load_image(path)
    assert image.size == (WIDTH // 2, HEIGHT // 2)
    np.testing.assert_allclose(same_size(image).pixel_values[0], to_pixels(means(picture)), rtol=0, atol=8 / 127.5)


def test_a_picture_of_90_million_pixels_is_read_at_bounded_memory(tmp_path):
    """A byte a pixel, as Pillow keeps it, and not the three or four of RGB beside it."""
    (tmp_path / "big.png").write_bytes(png(1, 0, [b"\xff" * 1200] * 9400, 9600))
    program = (
        "import sys; from paddlemix.processors.image_processing_emu3 import *; "
        "pixels = Emu3VisionVQImageProcessor()(load_image(sys.argv[1])).pixel_values; "
        "print(*pixels.shape, pixels.min(), *open('/proc/self/status').read().split('VmHWM:')[1].split()[:1])"
    )
    out = subprocess.run([sys.executable, "-c", program, tmp_path / "big.png"], capture_output=True, check=True).stdout
    *shape, least, peak = out.split()
    assert shape == [b"1", b"3", b"1008", b"1032"] and least == b"1.0" and int(peak) < 350 * 1024


def test_psnr():
    """20 log10(255) for a difference of 1 everywhere; of PIL pictures and of arrays, either way round."""
    black, other = Image.new("RGB", (8, 4)), np.ones([4, 8, 3], np.uint8)
    assert psnr(black, other) == psnr(other, black) == pytest.approx(20 * np.log10(255))
    assert psnr(black, other * 255) == 0 and psnr(black, black) == np.inf
