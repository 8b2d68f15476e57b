# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pictures to pixels and back: the original's numbers, every kind of picture, and every mistake of a user."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paddlemix
from paddlemix.processors.image_processing_emu3 import Emu3VisionVQImageProcessor, load_image, psnr, smart_resize
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


def test_a_transparent_palette_keeps_its_colours_without_a_warning(same_size, colours, tmp_path):
    image = Image.fromarray(colours).quantize(16)
    palette = np.array(image.getpalette()[: 16 * 3], np.uint8).reshape(16, 3)
    image.save(tmp_path / "clear.png", transparency=bytes(range(0, 256, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = same_size(load_image(tmp_path / "clear.png")).pixel_values[0]
    np.testing.assert_allclose(pixels, to_pixels(palette[np.asarray(image)]), rtol=0, atol=1e-6)


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
    settings = {**RELEASED, **size, "size": size, "new": [1]}
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


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_load_image_refuses_a_picture_cut_short(tmp_path, format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "picture"
    Image.fromarray(noise).save(path, format)
    whole = path.read_bytes()
    assert load_image(path).size == (64, 64)
    path.write_bytes(whole[: len(whole) // 2])
    refusal(path)


@pytest.mark.parametrize("limit", [1000, 100])  # Pillow warns above the limit, and raises above its double
def test_load_image_refuses_a_decompression_bomb(tmp_path, colours, monkeypatch, limit):
    Image.fromarray(colours).save(tmp_path / "bomb.png")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", limit)
    assert f"{HEIGHT * WIDTH} pixels" in refusal(tmp_path / "bomb.png")


def test_psnr():
    """20 log10(255) for a difference of 1 everywhere; of PIL pictures and of arrays, either way round."""
    black, other = Image.new("RGB", (8, 4)), np.ones([4, 8, 3], np.uint8)
    assert psnr(black, other) == psnr(other, black) == pytest.approx(20 * np.log10(255))
    assert psnr(black, other * 255) == 0 and psnr(black, black) == np.inf
