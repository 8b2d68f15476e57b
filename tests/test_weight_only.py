# Licensed under the Apache License, Version 2.0; see LICENSE.
"""int8 and int4 on a GPU. Paddle's kernels need a card; these stand-ins compute what its documentation says of them,
from weights in an order that only they know."""

import weakref

import numpy as np
import paddle
import pytest
from conftest import golden, relative_error

from paddlemix.external_ops.few_rows_linear import dequantize, quantize
from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM, checkpoint, linear
from paddlemix.models.emu3.linear import WeightOnlyLinear, quant
from paddlemix.models.emu3.modeling_emu3 import Emu3Linear
from paddlemix.paddle_private import to_tensor
from paddlemix.utils import InputError

IDS = paddle.to_tensor(golden("language_model.npz")["plain_ids"])
DTYPES = ["int8", "int4"]


def weight_quantize(x, algo="weight_only_int8", arch=None, group_size=-1):
    """x [in, out] -> int8 [out, in], of int4 [out / 2, in], last inputs first; scale [out] or [groups, out]"""
    assert x.dtype in (paddle.float16, paddle.bfloat16) and x.shape[0] % 32 == 0
    bits = int(algo.removeprefix("weight_only_int"))
    x = x.astype("float32").numpy()
    groups = x.reshape(-1, x.shape[0] if group_size == -1 else group_size, x.shape[1])
    scale = np.abs(groups).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    levels = np.rint(groups / scale).reshape(x.shape).T[:, ::-1]
    if bits == 4:
        levels = levels[::2] + 16 * levels[1::2]
    return paddle.to_tensor(levels.astype("int8")), paddle.to_tensor(scale.squeeze(1).squeeze())


def weight_only_linear(x, weight, bias=None, weight_scale=None, weight_dtype="int8", arch=None, group_size=-1):
    assert bias is None and weight.dtype == paddle.int8
    levels = weight.numpy()[:, ::-1].astype(int)
    if weight_dtype == "int4":
        low = (levels + 8) % 16 - 8
        levels = np.stack([low, (levels - low) // 16], 1).reshape(-1, levels.shape[1])
    scale = weight_scale.astype("float32").numpy()
    scale = scale[:, None] if group_size == -1 else scale.T.repeat(group_size, 1)
    out = x.astype("float32").numpy() @ (levels * scale).T.astype("float32")
    return paddle.to_tensor(out).astype(x.dtype)


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(quant, "weight_quantize", weight_quantize)
    monkeypatch.setattr(quant, "weight_only_linear", weight_only_linear)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(checkpoint, "require_memory", lambda *_: None)
    for module in (checkpoint, linear):  # without its copy to a card
        monkeypatch.setattr(module, "share", lambda array, to: to_tensor(array)._share_underline_tensor_to(to))


def a_layer(dtype, in_features=256, out_features=48):
    layer = Emu3Linear(Emu3Config().quantized(dtype), in_features, out_features)
    weight = paddle.randn([out_features, in_features])
    weight[3] *= 1e-3
    for target, value in zip((layer.weight, layer.weight_scale), quantize(weight, 8 if dtype == "int8" else 4)):
        target.set_value(value)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer(card, dtype):
    layer = a_layer(dtype)
    x = paddle.randn([2, 3, 256]).astype("bfloat16")
    expected = x.astype("float32") @ dequantize(layer.weight, layer.weight_scale, 256).T
    other = WeightOnlyLinear(layer, "bfloat16")
    assert other(x).dtype == paddle.bfloat16 and other(x).shape == [2, 3, 48]
    assert relative_error(other(x).astype("float32").numpy(), expected.numpy()) < 0.01
    np.testing.assert_array_equal(
        other(x, slice(5, 9)).astype("float32").numpy(), other(x)[..., 5:9].astype("float32").numpy()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_paddles_own_order_keeps_every_level(monkeypatch, dtype):
    """This kernel runs on a CPU, too: its bytes, or half bytes, are the levels plus 128, or 8, in another order."""
    real, kept = quant.weight_quantize, {}

    def on_a_cpu(x, algo, group_size):
        kept["weight"], kept["scale"] = real(x, algo, arch=80, group_size=group_size)
        return kept["weight"], kept["scale"]

    monkeypatch.setattr(quant, "weight_quantize", on_a_cpu)
    layer = a_layer(dtype)
    with pytest.raises(InputError):  # weight_only_linear has no kernel for a CPU
        WeightOnlyLinear(layer, "bfloat16")
    found = kept["weight"].numpy().view(np.uint8).astype(int)
    levels = dequantize(layer.weight, paddle.ones_like(layer.weight_scale), 256).numpy().astype(int)
    if dtype == "int8":
        found = found - 128
    else:
        found = np.stack([found % 16, found // 16]) - 8
    np.testing.assert_array_equal(np.sort(found, axis=None), np.sort(levels, axis=None))
    assert (kept["scale"].astype("float32") == 1).all()


def test_a_model(card, language_dir, monkeypatch):
    model = Emu3ForCausalLM.from_pretrained(language_dir, "int8")
    assert not [layer for layer in model.sublayers() if isinstance(layer, Emu3Linear)]
    monkeypatch.setattr(paddle, "get_device", lambda: "cpu")
    expected = Emu3ForCausalLM.from_pretrained(language_dir, "int8")(IDS).logits
    assert relative_error(model(IDS).logits.numpy(), expected.numpy()) < 0.01


def test_first_weights_go_with_their_layer(card, language_dir, monkeypatch):
    """A card need not hold the model twice."""
    seen, alive = [], []

    def count(linear, dtype):
        seen.append(weakref.ref(linear))
        alive.append(sum(layer() is not None for layer in seen))
        return WeightOnlyLinear(linear, dtype)

    monkeypatch.setattr(linear, "WeightOnlyLinear", count)
    Emu3ForCausalLM.from_pretrained(language_dir, "int8")
    assert len(alive) > 10 and max(alive) <= 2


def test_not_saved_from_a_card(card, language_dir, tmp_path):
    model = Emu3ForCausalLM.from_pretrained(language_dir, "int8")
    with pytest.raises(InputError, match="int8 weights are not saved from a GPU"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_the_kernels_do_not_take(card):
    with pytest.raises(InputError, match=r"do not take a weight \[48, 100\].*take bfloat16, or the device cpu"):
        WeightOnlyLinear(a_layer("int8", in_features=100), "bfloat16")


def test_what_a_card_has_no_kernel_for(card, monkeypatch):
    def not_compiled(*arguments, **named):
        raise OSError("(External) CUDA error(209), no kernel image is available for execution on the device.")

    monkeypatch.setattr(quant, "weight_only_linear", not_compiled)
    with pytest.raises(InputError, match=r"do not take a weight \[48, 256\].*take bfloat16, or the device cpu"):
        WeightOnlyLinear(a_layer("int8"), "bfloat16")


def test_what_the_kernels_compute_wrongly(card, monkeypatch):
    """As a card would whose kernels read another order."""

    def another_order(x, weight, *rest, **named):
        return weight_only_linear(x, paddle.to_tensor(weight.numpy()[:, ::-1].copy()), *rest, **named)

    monkeypatch.setattr(quant, "weight_only_linear", another_order)
    with pytest.raises(InputError, match="compute a weight .* wrongly"):
        WeightOnlyLinear(a_layer("int8"), "bfloat16")
