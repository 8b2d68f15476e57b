# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The vision tokenizer against the original's numbers."""

import numpy as np
import paddle
import pytest
from conftest import golden, relative_error

from paddlemix.external_ops.nearest_codeword import CHUNK
from paddlemix.models.emu3 import Emu3VisionVQConfig, Emu3VisionVQModel
from paddlemix.models.emu3.modeling_emu3visionvq import VectorQuantizer

DATA = golden("vision_tokenizer.npz")


@pytest.fixture(autouse=True)
def no_gradients():
    with paddle.no_grad():
        yield


@pytest.mark.parametrize("kind", ["image", "video"])
def test_golden_encode(vision_model, kind):
    pixels = paddle.to_tensor(DATA[kind])
    latents = vision_model.latents(pixels).transpose([0, 1, 4, 2, 3])
    assert relative_error(latents.numpy(), DATA[f"{kind}_latent"]) < 1e-5
    codes = vision_model.encode(pixels)
    assert codes.dtype == paddle.int64
    np.testing.assert_array_equal(codes.numpy(), DATA[f"{kind}_codes"])


@pytest.mark.parametrize(
    ("codes", "pixels"),
    [("image_codes", "image_recon"), ("video_codes", "video_recon"), ("random_codes", "random_recon")],
)
def test_golden_decode(vision_model, codes, pixels):
    decoded = vision_model.decode(paddle.to_tensor(DATA[codes]))
    assert decoded.shape == list(DATA[pixels].shape)
    assert relative_error(decoded.numpy(), DATA[pixels]) < 1e-5


def test_a_picture_is_a_video_of_four_equal_frames(vision_model):
    image = paddle.to_tensor(DATA["image"][:1, :, :32, :40])
    video = image.unsqueeze(1).expand([-1, 4, -1, -1, -1])
    codes = vision_model.encode(image)
    np.testing.assert_array_equal(codes.numpy(), vision_model.encode(video)[:, 0].numpy())
    frames = vision_model.decode(codes.unsqueeze(1))
    assert relative_error(vision_model.decode(codes).numpy(), frames[:, 0].numpy()) < 1e-5


def test_nearest_codeword_over_several_chunks():
    quantizer = VectorQuantizer(Emu3VisionVQConfig(codebook_size=50))
    x = np.random.RandomState(0).standard_normal([1, 1, 2 * CHUNK + 7, 4]).astype("float32")
    quantizer.embedding.weight.set_value(np.random.RandomState(1).standard_normal([50, 4]).astype("float32"))
    codebook = quantizer.embedding.weight.numpy().astype("float64")
    expected = ((x[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(quantizer(paddle.to_tensor(x)).numpy(), expected)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([1, 3, 60, 64], "multiples of 8"),
        ([1, 3, 64, 1], "multiples of 8"),
        ([1, 3, 0, 64], "no elements"),
        ([1, 6, 3, 32, 32], "multiple of 4"),
        ([1, 4, 32, 32], "must be"),
        ([3, 32, 32], "must be"),
    ],
)
def test_sides_and_frames_that_do_not_divide(vision_model, shape, words):
    with pytest.raises(ValueError, match=words):
        vision_model.encode(paddle.zeros(shape))


@pytest.mark.parametrize("codes", [[[[0, 32768]]], [[[-1]]], [[0, 1]]])
def test_codes_outside_the_codebook(vision_model, codes):
    with pytest.raises(ValueError, match="codes must be"):
        vision_model.decode(paddle.to_tensor(codes))


@pytest.mark.parametrize("pixels", [DATA["image"], paddle.zeros([1, 3, 8, 8], dtype="uint8")])
def test_pixels_of_another_kind(vision_model, pixels):
    with pytest.raises(ValueError, match="Paddle tensor of floats"):
        vision_model.encode(pixels)
    with pytest.raises(ValueError, match="Paddle tensor of int64"):
        vision_model.decode(pixels)


def test_float64_pixels_and_int32_codes_are_cast(vision_model):
    pixels = paddle.to_tensor(DATA["image"].astype("float64"))
    np.testing.assert_array_equal(vision_model.encode(pixels).numpy(), DATA["image_codes"])
    decoded = vision_model(pixels)
    codes = paddle.to_tensor(DATA["image_codes"].astype("int32"))
    np.testing.assert_array_equal(decoded.numpy(), vision_model.decode(codes).numpy())


def test_released_names_and_shapes():
    with paddle.LazyGuard():
        model = Emu3VisionVQModel(Emu3VisionVQConfig())
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == golden("layout-Emu3-VisionTokenizer.json")


def test_it_trains(vision_dir):
    model = Emu3VisionVQModel.from_pretrained(vision_dir).train()
    before = model.encoder.time_res_stack[0].norm1.running_mean.numpy().copy()
    with paddle.enable_grad():
        model.latents(paddle.to_tensor(DATA["image"][:, :, :16, :16])).sum().backward()
    assert np.abs(model.encoder.conv_in.weight.grad.numpy()).max() > 0
    assert not np.allclose(before, model.encoder.time_res_stack[0].norm1.running_mean.numpy())
