# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The 3 x 3 convolution by Winograd's filtering against the definition in float64."""

import ctypes

import numpy as np
import paddle
import pytest
from conftest import relative_error

from paddlemix.external_ops import operators, winograd
from paddlemix.external_ops.spatial_norm import spatial_norm
from paddlemix.external_ops.winograd import winograd_conv
from paddlemix.models.emu3 import Emu3VisionVQConfig, Emu3VisionVQModel, onednn

# height, width, in, out: one tile and less, odd and even sides, multiples of 4 and 5, more tiles than a block, more
# inputs than are added up at once, more weights than a group
SHAPES = [
    (1, 1, 16, 64), (1, 5, 48, 64), (6, 4, 64, 128), (4, 6, 16, 64), (9, 13, 32, 192), (25, 31, 16, 64),
    (8, 10, 144, 64), (3, 2, 528, 576),
]  # fmt: skip

pytestmark = pytest.mark.skipif(operators() is None, reason="the operators are not built: make ops")


def random_problem(height, width, channels, out, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal([height, width, channels]).astype(np.float32)
    weight = rng.standard_normal([out, channels, 3, 3]).astype(np.float32) / (9 * channels) ** 0.5
    return x, weight, rng.standard_normal(out).astype(np.float32)


def by_definition(x, weight, bias):
    """float64 [height, width, out], zeros around."""
    height, width, _ = x.shape
    padded = np.pad(x.astype(np.float64), [(1, 1), (1, 1), (0, 0)])
    return bias + sum(
        padded[i : i + height, j : j + width] @ weight[:, :, i, j].T.astype(np.float64)
        for i in range(3) for j in range(3)
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("doubled", [False, True], ids=["single", "doubled"])
def test_values(vectors, shape, doubled):
    x, weight, bias = random_problem(*shape)
    expected = by_definition(x.repeat(2, 0).repeat(2, 1) if doubled else x, weight, bias)
    tensors = paddle.to_tensor(weight), paddle.to_tensor(bias)
    out = np.full(expected.shape, np.nan, np.float32)
    winograd_conv(x, *tensors, out, doubled=doubled)
    assert np.abs(out - expected).max() < 3e-6 * np.abs(expected).max()
    before = random_problem(*out.shape, 64, seed=1)[0].astype(np.float32)
    sums = before.copy()
    winograd_conv(x, *tensors, sums, add=True, doubled=doubled)
    np.testing.assert_array_equal(sums, before + out)


@pytest.mark.parametrize("shape", [(6, 10, 144, 64), (36, 28, 32, 64)], ids=str)
@pytest.mark.parametrize("latent", [False, True], ids=["", "latent"])
def test_a_norm_before_it(vectors, shape, latent):
    """It is the same as spatial_norm, which test_spatial_norm.py compares with the definition."""
    height, width, channels, _ = shape
    x, weight, bias = random_problem(*shape)
    numbers = random_problem(height // 2, width // 2, channels, 64, seed=1)[0]
    norm = {"weight": paddle.to_tensor(numbers[0, 0]), "bias": paddle.to_tensor(numbers[0, 1]), "groups": 16}
    norm |= {"epsilon": 1e-6, "silu": latent}
    if latent:
        norm |= {"scale": numbers, "shift": numbers[::-1].copy()}
    tensors = paddle.to_tensor(weight), paddle.to_tensor(bias)
    expected, found = np.empty([2, height, width, 64], np.float32)
    winograd_conv(spatial_norm(x, **norm), *tensors, expected)
    winograd_conv(x, *tensors, found, norm=norm)
    np.testing.assert_array_equal(found, expected)


def test_how_it_rounds():
    """At most 1.4 times as much as a sum of all products one after the other: the tiles round more, short sums less."""
    x, weight, bias = random_problem(12, 12, 256, 64)
    tensors, exact = [paddle.to_tensor(weight), paddle.to_tensor(bias)], by_definition(x, weight, bias)
    found, padded, one_by_one = np.empty([12, 12, 64], np.float32), np.pad(x, [(1, 1), (1, 1), (0, 0)]), bias
    winograd_conv(x, *tensors, found)
    for i, j, c in np.ndindex(3, 3, 256):
        one_by_one = one_by_one + padded[i : i + 12, j : j + 12, c, None] * weight[:, c, i, j]
    assert ((found - exact) ** 2).mean() < 2 * ((one_by_one - exact) ** 2).mean()


def test_any_number_of_threads():
    """Each result is computed by one thread, in the same order whatever their number."""
    x, weight, bias = random_problem(17, 19, 64, 128)
    found = []
    openmp = ctypes.CDLL(str(onednn.LIBRARIES / "libiomp5.so"))
    before = openmp.omp_get_max_threads()
    for number in (1, 2, 5):
        openmp.omp_set_num_threads(number)
        found.append(np.empty([17, 19, 128], np.float32))
        winograd_conv(x, paddle.to_tensor(weight), paddle.to_tensor(bias), found[-1])
    openmp.omp_set_num_threads(before)
    assert all((out == found[0]).all() for out in found)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "out", "words"),
    [
        ([4, 4, 8], [64, 8, 3, 3], [64], [4, 4, 64], "multiple of 16"),
        ([0, 4, 16], [64, 16, 3, 3], [64], [0, 4, 64], "not empty"),
        ([4, 4, 16], [32, 16, 3, 3], [32], [4, 4, 32], "multiple of 64"),
        ([4, 4, 16], [64, 32, 3, 3], [64], [4, 4, 64], "weight must be"),
        ([4, 4, 16], [64, 16, 1, 1], [64], [4, 4, 64], "weight must be"),
        ([4, 4, 16], [64, 16, 3, 3], [65], [4, 4, 64], "bias must be"),
        ([4, 4, 16], [64, 16, 3, 3], [64], [8, 8, 64], "out must be"),
    ],
)
def test_what_it_does_not_take(x, weight, bias, out, words):
    with pytest.raises(Exception, match=words):
        winograd_conv(
            np.ones(x, np.float32), paddle.ones(weight), paddle.ones(bias), np.ones(out, np.float32), doubled=False
        )
    with pytest.raises(Exception, match="float32 on a CPU"):
        winograd_conv(np.ones([4, 4, 16]), paddle.ones([64, 16, 3, 3]), paddle.ones([64]), np.ones([4, 4, 64], "f4"))


def test_a_norm_of_other_channels():
    x, weight, bias = random_problem(4, 4, 16, 64)
    norm = {"weight": paddle.ones([32]), "bias": paddle.ones([32]), "groups": 4, "epsilon": 1e-6}
    with pytest.raises(Exception, match="weight and bias"):
        winograd_conv(x, paddle.to_tensor(weight), paddle.to_tensor(bias), np.empty([4, 4, 64], np.float32), norm=norm)


def test_the_vision_tokenizer_takes_it(monkeypatch):
    """It and oneDNN, which computes by the definition, give the same pictures."""
    paddle.seed(0)
    config = {"ch": 64, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (1,), "codebook_size": 64}
    model = Emu3VisionVQModel(Emu3VisionVQConfig(**config)).eval()
    calls, real = [], winograd_conv
    monkeypatch.setattr(winograd, "winograd_conv", lambda *a, **k: calls.append(k) or real(*a, **k))
    with paddle.no_grad():
        z, zq = paddle.randn([2, 2, 4, 5, 7])
        found = model.decoder.decode_frames(z, zq).numpy()
        doubled = [k.get("doubled", False) for k in calls]
        monkeypatch.setattr(winograd, "takes", lambda weight: False)
        expected = model.decoder.decode_frames(z, zq).numpy()
    assert sum(doubled) == 2 and len(doubled) > 20 and len(calls) == len(doubled)
    assert 0 < relative_error(found, expected) < 1e-4
