# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The vision tokenizer's 2-D layers by oneDNN and the compiled operators against the eager layers.

The golden tests run through them as well.
"""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import golden, relative_error

from paddlemix import external_ops
from paddlemix.external_ops import winograd
from paddlemix.machine import available_cores
from paddlemix.models.emu3 import Emu3VisionVQConfig, Emu3VisionVQModel, onednn, vision_engine
from paddlemix.models.emu3.reused_memory import empty, reused_memory

DATA = golden("vision_tokenizer.npz")
CONFIGS = {
    "released layers, fewer channels": {"ch": 32, "num_res_blocks": 2},
    "demo": {"ch": 64, "ch_mult": (1, 1, 2, 2), "num_res_blocks": 1, "codebook_size": 1024},
    "one level": {"ch": 32, "ch_mult": (1,), "attn_resolutions": (0,), "num_res_blocks": 1},
}

pytestmark = pytest.mark.skipif(onednn.load() is None, reason="this Paddle brings no oneDNN")


@pytest.fixture(autouse=True)
def no_gradients():
    with paddle.no_grad():
        yield


@pytest.fixture(params=["compiled operators", "oneDNN alone"], autouse=True)
def operators(request, monkeypatch):
    if request.param == "oneDNN alone":
        for module in (vision_engine, winograd):
            monkeypatch.setattr(module, "operators", lambda: None)
    elif external_ops.operators() is None:
        pytest.skip("the operators are not built: make ops")


@pytest.fixture
def eager(monkeypatch):
    """The result of a function without the engine."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(vision_engine, "can_run", lambda *_: False)
            return function(*arguments).numpy()

    return run


@pytest.fixture
def calls(monkeypatch):
    """The sizes of what the engine encodes."""
    sizes, encode = [], vision_engine.encode_frames

    def count(encoder, pixels):
        sizes.append(pixels.shape)
        return encode(encoder, pixels)

    monkeypatch.setattr(vision_engine, "encode_frames", count)
    return sizes


def make_model(seed=0, **config):
    paddle.seed(seed)
    model = Emu3VisionVQModel(Emu3VisionVQConfig(**config)).eval()
    for p in model.parameters():  # biases are zeros and norms ones at first, which would hide mistakes
        if p.ndim == 1:
            p.set_value(p + 0.1 * paddle.randn(p.shape))
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_equals_the_eager_layers_at_several_sizes(config, eager):
    model = make_model(**config)
    factor = model.spatial_scale_factor
    for batch, height, width in [(1, 5, 3), (3, 8, 8), (1, 1, 1), (2, 1, 9), (1, 16, 20)]:
        pixels = paddle.rand([batch, 3, height * factor, width * factor]) * 2 - 1
        expected = eager(model.encoder.encode_frames, pixels)
        assert relative_error(model.encoder.encode_frames(pixels).numpy(), expected) < 1e-5
        z, zq = paddle.randn([2, batch, 4, height, width])
        expected = eager(model.decoder.decode_frames, z, zq)
        assert relative_error(model.decoder.decode_frames(z, zq).numpy(), expected) < 1e-4


@pytest.mark.parametrize("size", [2, 64])  # of the weights: with the large ones attention is to one position
def test_attention_over_more_queries_than_are_computed_at_once(size, eager, monkeypatch):
    monkeypatch.setattr(vision_engine, "QUERIES", 7)
    model = make_model(**CONFIGS["one level"])
    for name, p in model.encoder.named_parameters():
        if name.endswith((".q.weight", ".k.weight")):
            p.set_value(size * p)
    pixels = paddle.rand([1, 3, 5, 9]) * 2 - 1
    expected = eager(model.encoder.encode_frames, pixels)
    assert relative_error(model.encoder.encode_frames(pixels).numpy(), expected) < 1e-4


def test_it_is_as_exact_as_the_eager_layers(eager):
    """Both against float64: what is left between them is the rounding of float32."""
    model = make_model(**CONFIGS["demo"])
    z, zq = paddle.randn([2, 1, 4, 12, 10])
    ours, theirs = model.decoder.decode_frames(z, zq).numpy(), eager(model.decoder.decode_frames, z, zq)
    exact = model.to(dtype="float64").decoder.decode_frames(z.astype("float64"), zq.astype("float64")).numpy()
    assert relative_error(ours, exact) < max(1e-5, 2 * relative_error(theirs, exact))


def test_it_is_what_computes_the_golden_numbers(vision_model, calls):
    vision_model.encode(paddle.to_tensor(DATA["image"]))
    vision_model.encode(paddle.to_tensor(DATA["video"]))
    assert len(calls) == 2


def test_changed_weights_are_seen(eager, calls):
    model, pixels = make_model(**CONFIGS["one level"]), paddle.rand([1, 3, 16, 16])
    first = model.encoder.encode_frames(pixels).numpy()
    model.encoder.conv_in.weight.set_value(model.encoder.conv_in.weight * 3)
    model.encoder.norm_out.bias.add_(paddle.ones([32]))
    model.encoder.conv_out.weight[:] = 2 * model.encoder.conv_out.weight
    second = model.encoder.encode_frames(pixels).numpy()
    assert relative_error(second, eager(model.encoder.encode_frames, pixels)) < 1e-5
    assert relative_error(second, first) > 0.1
    model.set_state_dict(make_model(seed=1, **CONFIGS["one level"]).state_dict())
    third = model.encoder.encode_frames(pixels).numpy()
    assert relative_error(third, eager(model.encoder.encode_frames, pixels)) < 1e-5
    assert len(calls) == 3


def test_what_it_leaves_to_the_eager_layers(calls, monkeypatch):
    pixels = paddle.rand([1, 3, 16, 16])

    def encode(change, x=pixels):
        model = make_model(**CONFIGS["one level"])
        change(model)
        return model.encoder.encode_frames(x)

    encode(lambda model: model.train())
    encode(lambda model: model.encoder.mid.train())
    encode(lambda model: model.to(dtype="float64"), pixels.astype("float64"))
    encode(lambda model: model.encoder.mid.register_forward_post_hook(lambda layer, x, y: 2 * y))
    encode(lambda model: setattr(model.encoder.mid.attn_1, "proj_out", Halved(32, 32, 1)))
    conv = paddle.nn.Conv2D
    for other in (
        conv(32, 32, 3, padding=2, dilation=2), conv(32, 32, 3, padding=1, padding_mode="reflect"),
        conv(32, 32, 3, padding=1, bias_attr=False), conv(32, 32, 3, padding=1, groups=2),
        paddle.nn.Sequential(conv(32, 32, 3, padding=1), paddle.nn.Tanh()),
    ):  # fmt: skip
        encode(lambda model, other=other: setattr(model.encoder.mid.block_1, "conv1", other))
    encode(lambda model: setattr(model.encoder, "norm_out", paddle.nn.BatchNorm2D(32)))
    for dtype in ("float16", "float64"):
        with pytest.raises((RuntimeError, ValueError)):  # Paddle's own, of other numbers than the weights
            encode(lambda model: None, pixels.astype(dtype))
    with paddle.enable_grad():
        encode(lambda model: None)
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "LIBRARIES", onednn.LIBRARIES / "none")
        onednn.load.cache_clear()
        encode(lambda model: None)
    onednn.load.cache_clear()
    assert not calls
    with paddle.enable_grad():  # nothing wants a gradient
        encode(lambda model: [setattr(p, "stop_gradient", True) for p in model.parameters()])
    assert len(calls) == 1


class Halved(paddle.nn.Conv2D):
    def forward(self, x):
        return super().forward(x) / 2


def test_inputs_are_left_as_they_are():
    model = make_model(**CONFIGS["one level"])
    z, zq = paddle.randn([2, 1, 4, 8, 8])
    before = z.numpy().copy(), zq.numpy().copy()
    model.decoder.decode_frames(z, zq)
    np.testing.assert_array_equal(before, (z.numpy(), zq.numpy()))


def test_memory_is_used_again_where_no_array_uses_it():
    with reused_memory():
        first = empty([3, 4])
        place, part = first.ctypes.data, first[1:]
        assert place % 64 == 0 and empty([3, 4]).ctypes.data != place
        del first  # a part of it is still there
        assert empty([3, 4]).ctypes.data != place
        del part
        again = empty([2, 5])
        assert again.ctypes.data == place and again.dtype == np.float32
    assert empty([3, 4]).ctypes.data != place and again.shape == (2, 5)


THREADS = """
import ctypes
from paddlemix.models.emu3 import onednn
threads = ctypes.CDLL(str(onednn.LIBRARIES / "libiomp5.so")).omp_get_max_threads
before = threads()
with onednn.all_cores():
    print(threads())
assert threads() == before
"""


@pytest.mark.skipif(not (onednn.LIBRARIES / "libiomp5.so").exists(), reason="another OpenMP")
@pytest.mark.parametrize("chosen", [None, "1", "3"])
def test_threads_are_the_cores_given_or_those_chosen(chosen):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": chosen} if chosen else {}
    printed = subprocess.check_output([sys.executable, "-W", "ignore", "-c", THREADS], env=environment, text=True)
    assert int(printed.split()[-1]) == int(chosen or available_cores())
