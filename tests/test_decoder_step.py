# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A decoder layer in one operator against the same layer of many."""

import numpy as np
import paddle
import pytest
from conftest import relative_error

from paddlemix.external_ops import operators
from paddlemix.external_ops.decoder_step import decoder_step
from paddlemix.external_ops.few_rows_linear import FEW_ROWS
from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM, modeling_emu3
from paddlemix.models.emu3.cache import KVCache
from paddlemix.models.emu3.linear import Emu3Linear
from paddlemix.utils import InputError

pytestmark = pytest.mark.skipif(operators() is None, reason="the operators are not built: make ops")
SIZES = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 6, "num_key_value_heads": 2}


def make_model(dtype="float32", **config):
    paddle.seed(0)
    config = Emu3Config(vocab_size=50, num_hidden_layers=2, pad_token_id=0, **{**SIZES, **config})
    model = Emu3ForCausalLM(config if dtype in ("float32", "bfloat16") else config.quantized(dtype))
    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        if parameter.dtype == paddle.float32:
            at, size = (1.0, 0.1) if "norm" in name else (0.0, 0.01 if name.endswith("_scale") else 0.1)
            value = at + size * rng.standard_normal(parameter.shape)
            parameter.set_value(np.abs(value).astype(np.float32) if "scale" in name else value.astype(np.float32))
        else:
            parameter.set_value(rng.integers(*((-127, 128) if dtype == "int8" else (17, 256)), parameter.shape)
                                .astype(str(parameter.dtype).removeprefix("paddle.")))  # fmt: skip
    if dtype == "bfloat16":
        model.to(dtype="bfloat16")  # astype leaves the weights as they are
    assert dtype in ("int8", "int4") or {str(p.dtype) for p in model.parameters()} == {f"paddle.{dtype}"}
    return model.eval()


@pytest.fixture
def calls(monkeypatch):
    found = []

    def counted(*args):
        found.append(1)
        return decoder_step(*args)

    monkeypatch.setattr(modeling_emu3, "decoder_step", counted)
    return found


def step(model, batch, new, past, padded, cache_dtype):
    """Hidden states of `new` tokens over a cache of `past`, and all that the cache holds."""
    rng = np.random.default_rng(1)
    ids = paddle.to_tensor(rng.integers(1, 50, [batch, past + new]))
    mask = paddle.ones_like(ids)
    if padded:
        mask[0, : past // 2] = 0
    cache = KVCache(model.config, batch, past + new + 3, cache_dtype)
    for x in (*cache.keys, *cache.values):
        x[:] = paddle.to_tensor(rng.standard_normal(x.shape).astype(np.float32)).astype(cache_dtype)
    cache.length = past
    with paddle.no_grad():
        hidden = model.model(ids[:, past:], mask, past_key_values=cache)
    return [hidden.numpy(), *(x.astype("float32").numpy() for x in (*cache.keys, *cache.values))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "batch, new, past, padded",
    [(1, 1, 3, False), (2, 1, 300, True), (2, 8, 20, True), (3, 4, 70, False), (1, 20, 70, False), (2, 90, 40, True)],
)
def test_equals_the_layer(monkeypatch, calls, dtype, batch, new, past, padded):
    model = make_model(dtype)
    for cache_dtype in ("float32", "bfloat16", "float16"):
        calls.clear()
        got = step(model, batch, new, past, padded, cache_dtype)
        assert len(calls) == model.config.num_hidden_layers
        with monkeypatch.context() as patch:
            patch.setattr(modeling_emu3.Emu3Model, "_has_step", lambda *_: False)
            expected = step(model, batch, new, past, padded, cache_dtype)
        # a key may be rounded to another 16 bit number where sums differ in their last bit
        bound = {"float32": 3e-6, "bfloat16": 8e-3, "float16": 1e-3}[cache_dtype]
        # and an activation to another number of few bits
        more = {"float32": 0, "bfloat16": 4e-3 * (batch * new > FEW_ROWS), "int8": 1e-4, "int4": 1e-2}[dtype]
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) < bound + more
        bound = {"float32": 3e-6, "bfloat16": 2e-3, "float16": 3e-4}[cache_dtype]
        assert relative_error(got[0], expected[0]) < bound + more


@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}])
def test_heads_of_any_number(monkeypatch, calls, scaling):
    model = make_model(num_attention_heads=8, num_key_value_heads=8, rope_scaling=scaling, max_position_embeddings=16)
    got = step(model, 2, 3, 30, True, "float32")
    assert calls
    monkeypatch.setattr(modeling_emu3.Emu3Model, "_has_step", lambda *_: False)
    assert relative_error(got[0], step(model, 2, 3, 30, True, "float32")[0]) < 3e-6


def test_what_it_leaves_to_the_layer(calls):
    class Doubled(Emu3Linear):
        def forward(self, x, rows=None):
            return 2 * super().forward(x, rows)

    class Zeros(paddle.nn.Layer):
        def forward(self, x):
            return paddle.zeros_like(x)

    def exchanged(layer):
        layer.mlp.up_proj = Doubled(model.config, 96, 200)

    changes = {
        "exchanged": exchanged,
        "hook": lambda layer: layer.self_attn.register_forward_post_hook(lambda *_: None),
        "own forward": lambda layer: setattr(layer.mlp, "forward", type(layer.mlp).forward.__get__(layer.mlp)),
        "one layer of fewer bits": lambda layer: layer.mlp.gate_proj.to(dtype="bfloat16"),
        "of other parts": lambda layer: setattr(layer, "mlp", Zeros()),
        "another epsilon": lambda layer: setattr(layer.input_layernorm, "eps", 1e-2),
        "float64": lambda layer: layer.input_layernorm.to(dtype="float64"),
        "attention in training": lambda layer: layer.self_attn.train(),
        "training": lambda layer: model.train(),
    }
    for change in changes.values():
        model = make_model()
        change(model.model.layers[1])
        calls.clear()
        step(model, 1, 2, 5, False, "float32")
        assert not calls  # of a pass either all layers or none
    model = make_model()
    calls.clear()
    with paddle.no_grad():
        model.model(paddle.to_tensor([[1, 2]]))  # without a cache
    cache = model.make_cache(1, 8)
    hidden = model.model(paddle.to_tensor([[1, 2]]), past_key_values=cache)
    hidden = model.model(paddle.to_tensor([[3]]), past_key_values=cache)
    assert not hidden.stop_gradient and not calls


@pytest.mark.parametrize("view", [lambda x: x[1:], lambda x: x[:, :, :20]], ids=["rows", "room"])
def test_a_cache_made_of_views(view):
    """The operator writes into the cache, which it could not through a copy that Paddle makes of a view."""
    model, cache = make_model(), None
    ids = paddle.to_tensor(np.random.default_rng(0).integers(1, 50, [3, 9]))
    cache = KVCache(model.config, 3, 40, "float32")
    with paddle.no_grad():
        model.model(ids[:, :5], past_key_values=cache)
        cache = cache.map(view)
        ids = ids[-cache.keys[0].shape[0] :]
        for i in range(5, 9):
            hidden = model.model(ids[:, i : i + 1], past_key_values=cache)
        assert relative_error(hidden.numpy(), model.model(ids)[:, -1:].numpy()) < 1e-5
    layer = model.model.layers[0]
    norms, linears = layer._parts()
    weights = [part.weight for part in norms], [part.weight for part in linears]
    key = paddle.zeros([3, 2, 8, 16])[:, :, ::2]
    with pytest.raises(InputError, match="contiguous"):
        angles, lengths = [paddle.ones([1, 1, 1, 16])] * 2, paddle.to_tensor([3, 3, 3])
        decoder_step(paddle.ones([3, 1, 96]), *weights, None, *angles, key, key, lengths, None, 1e-5)


def test_the_operator_alone_refuses():
    def given(**changes):
        x, cache = paddle.ones([2, 1, 96]), paddle.zeros([2, 2, 8, 16])
        angles = paddle.ones([1, 1, 1, 16])
        shapes = [[96, 96], [32, 96], [32, 96], [96, 96], [200, 96], [200, 96], [96, 200]]
        arguments = {
            "x": x, "norms": [paddle.ones([96])] * 2, "weights": [paddle.ones(shape) for shape in shapes],
            "scales": None, "cosine": angles, "sine": angles, "key": cache, "value": cache.clone(),
            "lengths": paddle.to_tensor([3, 4]), "slots": None, "allowed": None, "epsilon": 1e-5,
        }  # fmt: skip
        return operators().decoder_step(*{**arguments, **changes}.values())

    assert given().shape == [2, 1, 96]
    wrong = {
        "x": paddle.ones([2, 96]), "norms": [paddle.ones([95])] * 2, "weights": [paddle.ones([96, 96])] * 7,
        "scales": [paddle.ones([96])] * 7, "cosine": paddle.ones([1, 2, 1, 16]), "sine": paddle.ones([16]),
        "key": paddle.zeros([2, 2, 9, 16]), "allowed": paddle.ones([2, 4]), "lengths": paddle.to_tensor([3, 9]),
        "slots": paddle.to_tensor([1, 1]),
    }  # fmt: skip
    odd = {"key": paddle.zeros([2, 2, 8, 15]), "value": paddle.zeros([2, 2, 8, 15])}
    empty = {"x": paddle.ones([0, 1, 96]), "key": paddle.zeros([0, 2, 8, 16]), "value": paddle.zeros([0, 2, 8, 16])}
    for changes in (odd, empty, {"x": None}, {"key": None}, {"cosine": paddle.ones([])}):
        with pytest.raises(Exception, match="decoder_step|must"):
            given(**changes)
    for name, value in wrong.items():
        with pytest.raises(Exception, match="decoder_step|must|have scales"):
            given(**{name: value})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_rows_of_their_own_lengths(calls, dtype):
    """Rows anywhere in the cache, each after its own number of tokens, against each of them alone."""
    model, lengths, slots = make_model(dtype), [3, 40, 17], [4, 0, 2]
    rng = np.random.default_rng(2)
    ids = [rng.integers(1, 50, [1, length + 2]) for length in lengths]
    cache = KVCache(model.config, 5, 48, "float32")
    with paddle.no_grad():
        for row, length, slot in zip(ids, lengths, slots, strict=True):
            model.model.read_prompt(paddle.to_tensor(row[:, :length]), 0, length, slot, cache)
        calls.clear()
        new = paddle.to_tensor(np.concatenate([row[:, -2:] for row in ids]))
        hidden = model.model.step(new, paddle.to_tensor(lengths), paddle.to_tensor(slots), cache)
        assert len(calls) == model.config.num_hidden_layers
        for got, row in zip(hidden, ids, strict=True):
            bound = {"int8": 1e-3, "int4": 3e-2}.get(dtype, 1e-5)  # where an activation is rounded to another number
            assert relative_error(got.numpy(), model.model(paddle.to_tensor(row))[0, -2:].numpy()) < bound
