# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The vision tokenizer's norm, as one operator, against the definition in float64."""

import numpy as np
import paddle
import pytest

from paddlemix.external_ops import operators
from paddlemix.external_ops.spatial_norm import spatial_norm

# height, width, channels, groups: a pixel, odd sides, channels that fill no vector, more pixels than a piece
SHAPES = [(1, 1, 32, 32), (3, 5, 6, 2), (8, 8, 64, 32), (40, 26, 96, 32), (2, 300, 20, 4)]
EPSILON = 1e-6

pytestmark = pytest.mark.skipif(operators() is None, reason="the operators are not built: make ops")


def by_definition(x, weight, bias, groups, scale=None, shift=None, silu=False):
    height, width, channels = x.shape
    by_group = x.astype(np.float64).reshape(height * width, groups, channels // groups)
    centred = by_group - by_group.mean((0, 2), keepdims=True)
    y = centred / np.sqrt((centred**2).mean((0, 2), keepdims=True) + EPSILON)
    y = y.reshape(x.shape) * weight + bias
    if scale is not None:
        times = height // len(scale)
        y = y * scale.repeat(times, 0).repeat(times, 1) + shift.repeat(times, 0).repeat(times, 1)
    return y / (1 + np.exp(-y)) if silu else y


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
@pytest.mark.parametrize("away", [0, 300], ids=["", "far from zero"])
def test_group_norm(vectors, shape, silu, away):
    *size, channels, groups = shape
    x = numbers(*size, channels) + np.float32(away)
    weight, bias = numbers(channels, seed=1), numbers(channels, seed=2)
    found = spatial_norm(x, paddle.to_tensor(weight), paddle.to_tensor(bias), groups, EPSILON, silu=silu)
    expected = by_definition(x, weight, bias, groups, silu=silu)
    assert np.abs(found - expected).max() < (1e-4 if away else 2e-6) * np.abs(expected).max()


@pytest.mark.parametrize(("height", "width", "times"), [(1, 3, 1), (6, 4, 2), (32, 40, 8)])
@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
def test_scaled_by_the_latent(vectors, height, width, times, silu):
    x, weight, bias = numbers(height, width, 64), numbers(64, seed=1), numbers(64, seed=2)
    latent = [numbers(height // times, width // times, 64, seed=seed) for seed in (3, 4)]
    found = spatial_norm(x, paddle.to_tensor(weight), paddle.to_tensor(bias), 32, EPSILON, *latent, silu=silu)
    expected = by_definition(x, weight, bias, 32, *latent, silu=silu)
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::2], lambda x: x[::-1], lambda x: x.transpose(1, 0, 2), lambda x: x.T]
)
def test_views(view):
    x = view(numbers(8, 6, 4))
    weight, bias = numbers(x.shape[2], seed=1), numbers(x.shape[2], seed=2)
    found = spatial_norm(x, paddle.to_tensor(weight), paddle.to_tensor(bias), 2, EPSILON)
    expected = by_definition(np.ascontiguousarray(x), weight, bias, 2)
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


def test_silu_of_large_numbers(vectors):
    """A norm of weight 0 gives its bias: sigmoid(-90) and less is as good as 0, and nothing overflows."""
    bias = np.linspace(-200, 200, 64, dtype=np.float32)
    found = spatial_norm(numbers(2, 2, 64), paddle.zeros([64]), paddle.to_tensor(bias), 32, EPSILON, silu=True)
    np.testing.assert_allclose(found[1, 1], bias / (1 + np.exp(-bias.astype(np.float64))), 1e-6, 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_group(vectors, bad):
    x = numbers(5, 5, 64)
    x[2, 3, 7] = bad
    found = spatial_norm(x, paddle.ones([64]), paddle.zeros([64]), 8, EPSILON, silu=True)
    assert np.isnan(found[..., :8]).any() and np.isfinite(found[..., 8:]).all()


@pytest.mark.parametrize(
    ("x", "weight", "groups", "scale", "shift", "words"),
    [
        ([0, 4, 32], 32, 32, None, None, "not empty"),
        ([4, 4, 32], 31, 32, None, None, "weight and bias"),
        ([4, 4, 32], 32, 5, None, None, "multiple of the groups"),
        ([4, 4, 32], 32, 32, [3, 3, 32], [3, 3, 32], "whole fraction"),
        ([4, 4, 32], 32, 32, [2, 2, 32], [2, 2, 16], "whole fraction"),
        ([4, 4, 32], 32, 32, [8, 8, 32], [8, 8, 32], "whole fraction"),
        ([4, 4, 32], 32, 32, [2, 2, 32], None, "whole fraction"),
    ],
)
def test_what_it_does_not_take(x, weight, groups, scale, shift, words):
    latent = [None if shape is None else np.ones(shape, np.float32) for shape in (scale, shift)]
    with pytest.raises(Exception, match=words):
        spatial_norm(np.ones(x, np.float32), paddle.ones([weight]), paddle.ones([weight]), groups, EPSILON, *latent)
