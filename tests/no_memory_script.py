# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Calls every operator of a CPU with memory missing from its n-th allocation on, for each n, and once more with memory;
test_external_ops.py runs it with no_memory.cc loaded. Prints how many calls of each raised MemoryError."""

import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import paddle

from paddlemix.external_ops.cached_attention import cached_attention
from paddlemix.external_ops.causal_attention import causal_attention
from paddlemix.external_ops.decoder_step import decoder_step
from paddlemix.external_ops.few_rows_linear import few_rows_linear, quantize
from paddlemix.external_ops.float_product import float_product
from paddlemix.external_ops.spatial_norm import spatial_norm
from paddlemix.external_ops.square_sum import square_sum
from paddlemix.external_ops.winograd import winograd_conv
from paddlemix.paddle_private import set_num_threads

rng, fail_after = np.random.default_rng(0), ctypes.CDLL(None).fail_after


def random(*shape):
    return paddle.to_tensor(rng.standard_normal(shape).astype(np.float32))


def linear(rows, bits=None):
    x, weight = random(rows, 2048), random(128, 2048)
    return lambda: few_rows_linear(x, *(quantize(weight, bits) if bits else [weight]))


def attention(new, length, dim):
    query, cache, lengths = random(1, new, 8, dim), random(1, 2, length, dim), paddle.to_tensor([length])
    return lambda: cached_attention(query, cache, cache, lengths)


def gradient():
    tensors = [random(1, 200, heads, 32) for heads in (4, 2, 2)]
    tensors[1:] = [x.transpose([0, 2, 1, 3]).contiguous() for x in tensors[1:]]

    def call():
        own = [x.clone().detach() for x in tensors]
        for x in own:
            x.stop_gradient = False
        causal_attention(*own).sum().backward()
        return paddle.concat([x.grad.flatten() for x in own])

    return call


def step(rows, new):
    hidden, heads, kv, dim, inner, past = 256, 8, 2, 32, 1024, 70
    sizes = [(heads * dim, hidden), *[(kv * dim, hidden)] * 2, (hidden, heads * dim), *[(inner, hidden)] * 2,
             (hidden, inner)]  # fmt: skip
    weights, norms = [random(*size) / 16 for size in sizes], [random(hidden) for _ in "12"]
    x, lengths = random(rows, new, hidden), paddle.full([rows], past + new, "int64")
    angles, cache = [random(rows, new, 1, dim) for _ in "cs"], [random(rows, kv, past + new, dim) for _ in "kv"]

    def call():
        return decoder_step(x, norms, weights, None, *angles, *cache, lengths, None, 1e-5)

    return call


def picture(operator, height, width, channels):
    x, out = random(height, width, channels).numpy(), np.empty([height, width, 64], np.float32)
    vectors, norm = [random(64) for _ in "wb"], [random(channels) for _ in "wb"]
    weight = random(64, channels, 3, 3)
    norm = {"weight": norm[0], "bias": norm[1], "groups": 4, "epsilon": 1e-6}

    def call():
        if operator is spatial_norm:
            return spatial_norm(x, **norm)
        winograd_conv(x, weight, vectors[0], out, norm=norm)
        return out.copy()

    return call


CALLS = {
    "few_rows_linear, int8": linear(4, 8), "few_rows_linear, many": linear(90),
    "few_rows_linear, many of int8": linear(90, 8), "cached_attention": attention(2, 3000, 64),
    "cached_attention, many": attention(90, 200, 64), "causal_attention": gradient(), "decoder_step": step(4, 2),
    "decoder_step, many": step(1, 90), "spatial_norm": picture(spatial_norm, 64, 64, 64),
    "winograd_conv": picture(winograd_conv, 40, 40, 272),
    "float_product": partial(float_product, random(90, 600), random(128, 600)),
    "square_sum": partial(square_sum, random(10**7)),
}  # fmt: skip


def attempt(call, allocations):
    """Whether it failed, and what it gives after that."""
    set_num_threads(2)
    fail_after(allocations)
    try:
        call()
        failed = False
    except MemoryError:
        failed = True
    finally:
        fail_after(-1)
    return failed, np.array(call())


def in_a_thread(function, *arguments):
    """In a new one, which has no memory from calls before."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function, *arguments).result()


for name, call in CALLS.items():
    expected = None
    for allocations in itertools.count():
        failed, found = in_a_thread(attempt, call, allocations)
        expected = found if expected is None else expected
        np.testing.assert_array_equal(found, expected)
        if not failed:
            break
    print(allocations, name, flush=True)
