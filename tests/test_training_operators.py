# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The operators of training on a CPU against float64, with their gradients."""

import os
import subprocess
import sys

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from paddlemix.external_ops import operators, without_operators
from paddlemix.external_ops.causal_attention import causal_attention
from paddlemix.external_ops.few_rows_linear import dequantize, few_rows_linear, quantize
from paddlemix.external_ops.float_product import float_product
from paddlemix.external_ops.fused_cross_entropy import fused_cross_entropy_
from paddlemix.external_ops.square_sum import square_sum
from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM
from paddlemix.training.loss import next_token_loss

pytestmark = pytest.mark.skipif(operators() is None, reason="the operators are not built: make ops")


@pytest.fixture(params=["plain", "avx2", "best"])
def vectors(request, monkeypatch):
    monkeypatch.setenv("EMU3_OPS_SIMD", request.param)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(found, right, tolerance=2e-6):
    """Within a tolerance of the largest number."""
    found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
    return found.shape == right.shape and np.abs(found - right).max(initial=0) <= tolerance * np.abs(right).max(
        initial=1
    )


def gradients(f, arrays, dy):
    """The result of f and the gradients of dy times it, of float32 tensors."""
    tensors = [paddle.to_tensor(array, stop_gradient=False) for array in arrays]
    y = f(*tensors)
    (y * paddle.to_tensor(dy)).sum().backward()
    return y.numpy(), [tensor.grad.numpy() for tensor in tensors]


@pytest.mark.parametrize("x_turned", [False, True])
@pytest.mark.parametrize("weight_turned", [False, True])
@pytest.mark.parametrize("rows, depth, out", [(1, 1, 1), (13, 70, 33), (131, 1300, 260), (9, 0, 5)])
def test_products(vectors, rows, depth, out, x_turned, weight_turned):
    x, weight, given = random(rows, depth), random(out, depth, seed=1), random(rows, out, seed=2)
    right = x.astype(np.float64) @ weight.T.astype(np.float64)
    x, weight = (
        paddle.to_tensor(np.ascontiguousarray(a.T if t else a)) for a, t in ((x, x_turned), (weight, weight_turned))
    )
    found = float_product(x, weight, x_turned=x_turned, weight_turned=weight_turned)
    assert close(found, right)
    into = paddle.to_tensor(given)
    found = float_product(x, weight, x_turned=x_turned, weight_turned=weight_turned, into=into)
    assert close(found, given + right) and (found.numpy() == into.numpy()).all()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("out, columns", [(5, 3), (70, 300)])
def test_the_gradient_passes_through_a_frozen_weight_of_fewer_bits(vectors, bits, out, columns):
    weight, scale = paddle.to_tensor(random(out, columns)), None
    if bits == 16:
        weight = weight.astype("bfloat16")
        wide = weight.astype("float32")
    else:
        weight, scale = quantize(weight, bits)
        wide = dequantize(weight, scale, columns)
    x, dy, wide = random(80, columns, seed=1), random(80, out, seed=2), wide.numpy().astype(np.float64)
    y, (dx,) = gradients(lambda x: few_rows_linear(x, weight, scale), [x], dy)
    assert close(y, x @ wide.T) and close(dx, dy @ wide)  # activations are not rounded


def test_a_linear_layer_with_gradients_of_both(vectors):
    x, weight, dy = random(2, 40, 130), random(65, 130, seed=1), random(2, 40, 65, seed=2)
    y, (dx, dweight) = gradients(few_rows_linear, [x, weight], dy)
    x, weight, dy = (a.astype(np.float64) for a in (x, weight, dy))
    assert close(y, x @ weight.T) and close(dx, dy @ weight)
    assert close(dweight, dy.reshape([80, 65]).T @ x.reshape([80, 130]))


def attention_in_float64(query, key, value, dout):
    """Causal attention of [batch, length, heads, dim], and its gradients, written out."""
    query, key, value, dout = (a.astype(np.float64) for a in (query, key, value, dout))
    batch, length, heads, dim = query.shape
    group = heads // key.shape[1]
    q, k, v = query.transpose(0, 2, 1, 3), key.repeat(group, 1), value.repeat(group, 1)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(dim)
    weights = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf) - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dout = dout.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
    dweights = dout @ v.swapaxes(2, 3)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) / np.sqrt(dim)

    def of_key_heads(x):
        return x.reshape([batch, -1, group, length, dim]).sum(2)

    out = (weights @ v).transpose(0, 2, 1, 3).reshape([batch, length, heads * dim])
    dkey, dvalue = dscores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dout
    return out, ((dscores @ k).transpose(0, 2, 1, 3), of_key_heads(dkey), of_key_heads(dvalue))


@pytest.mark.parametrize(
    "batch, length, heads, kv_heads, dim", [(2, 1, 2, 1, 5), (1, 70, 2, 1, 40), (2, 133, 4, 2, 64)]
)
def test_causal_attention(vectors, batch, length, heads, kv_heads, dim):
    query, dout = 2 * random(batch, length, heads, dim), random(batch, length, heads * dim, seed=3)
    key, value = (random(batch, kv_heads, length, dim, seed=i) for i in (1, 2))
    out, found = gradients(causal_attention, [query, key, value], dout)
    right, right_gradients = attention_in_float64(query, key, value, dout)
    assert close(out, right) and all(map(close, found, right_gradients))


@pytest.mark.parametrize("length, heads, dim", [(90, 2, 16), (5, 1, 8)])
def test_dropout_of_attention(vectors, length, heads, dim):
    """The values are unit vectors, so that the result is the weights after dropout; gradients are those of these."""
    query, key = random(1, length, heads, dim), random(1, heads, length, dim, seed=1)
    value, dout = random(1, heads, length, dim, seed=2), random(1, length, heads * dim, seed=3)

    def with_seed(*tensors):
        paddle.seed(7)
        return causal_attention(*tensors, 0.4)

    def kept_weights():
        parts = []
        for start in range(0, length, dim):
            units = np.zeros([1, heads, length, dim], np.float32)
            units[:, :, range(start, min(start + dim, length)), range(min(dim, length - start))] = 1
            parts.append(with_seed(*map(paddle.to_tensor, (query, key, units))).numpy().reshape([length, heads, dim]))
        return np.concatenate(parts, -1)[..., :length].transpose(1, 0, 2)

    kept, seen = kept_weights() > 0, np.tri(length, dtype=bool)
    assert not kept[:, ~seen].any() and 0.6 - 4 * (0.24 / seen.sum()) ** 0.5 < kept[:, seen].mean()
    out, found = gradients(with_seed, [query, key, value], dout)

    def plain(query, key, value):
        scores = paddle.matmul(query.transpose([0, 2, 1, 3]) / dim**0.5, key, transpose_y=True)
        weights = F.softmax(scores + paddle.to_tensor(np.where(seen, 0, -1e9).astype("float32")), -1)
        weights = weights * paddle.to_tensor((kept / 0.6).astype("float32"))
        return paddle.matmul(weights, value).transpose([0, 2, 1, 3]).reshape([1, length, heads * dim])

    right, right_gradients = gradients(plain, [query, key, value], dout)
    assert close(out, right) and all(map(close, found, right_gradients))


THREADS = """
import os, sys
os.environ["OMP_NUM_THREADS"] = sys.argv[1]
import hashlib, numpy as np, paddle
from paddlemix.external_ops.causal_attention import causal_attention
from paddlemix.external_ops.few_rows_linear import few_rows_linear
paddle.seed(1)
r = np.random.default_rng(0)
q, k, v, w = (paddle.to_tensor(r.standard_normal(s).astype("float32"), stop_gradient=False)
              for s in ([1, 200, 4, 32], [1, 2, 200, 32], [1, 2, 200, 32], [300, 128]))
few_rows_linear(causal_attention(q, k, v, 0.1), w).sum().backward()
print(hashlib.sha256(b"".join(x.grad.numpy().tobytes() for x in (q, k, v, w))).hexdigest())
"""


def test_gradients_do_not_depend_on_the_threads():
    found = [
        subprocess.run([sys.executable, "-W", "ignore", "-c", THREADS, str(threads)], capture_output=True, text=True,
                       check=True, env={**os.environ}).stdout.split()[-1]
        for threads in (1, 3)
    ]  # fmt: skip
    assert found[0] == found[1]


def test_cross_entropy(vectors):
    logits, labels = 5 * random(7, 2100), np.random.default_rng(1).integers(0, 2100, 7)
    logits[2] += 1000
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    sums = np.exp(wide).sum(-1, keepdims=True)
    given = paddle.to_tensor(logits)
    losses = fused_cross_entropy_(given, paddle.to_tensor(labels))
    assert close(losses, np.log(sums[:, 0]) - wide[range(7), labels])
    assert close(given, np.exp(wide) / sums - np.eye(2100)[labels], 3e-7)
    given = paddle.to_tensor(np.float32([[1, np.nan], [np.inf, 2], [1, 2]]))
    assert np.isnan(fused_cross_entropy_(given, paddle.to_tensor([0, 1, 0])).numpy()).tolist() == [True, True, False]


def test_square_sum(vectors):
    numbers = random(3, 50001)
    assert square_sum(paddle.to_tensor(numbers)) == pytest.approx((numbers.astype(np.float64) ** 2).sum(), rel=1e-12)


def test_the_loss_and_its_gradients_are_those_of_paddle(monkeypatch):
    """Of the whole model, the head in parts."""
    paddle.seed(0)
    config = Emu3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=True, attention_dropout=0.0,
    )  # fmt: skip
    model = Emu3ForCausalLM(config).train()
    monkeypatch.setattr("paddlemix.training.loss.LOGITS", 30 * 300)
    ids = paddle.randint(0, 300, [2, 50])
    labels = paddle.where(ids % 5 == 0, paddle.full_like(ids, -100), ids)

    def numbers():
        loss = next_token_loss(model, ids, labels) / 7.0
        loss.backward()
        found = [parameter.grad.numpy() for parameter in model.parameters()]
        model.clear_gradients()
        return float(loss), found

    loss, found = numbers()
    with without_operators():
        right_loss, right = numbers()
    assert loss == pytest.approx(right_loss, rel=1e-6)
    assert all(close(a / np.abs(b).max(), b / np.abs(b).max(), 2e-5) for a, b in zip(found, right, strict=True))
    with paddle.no_grad():
        assert float(next_token_loss(model, ids, labels)) == pytest.approx(7 * loss, rel=1e-6)
