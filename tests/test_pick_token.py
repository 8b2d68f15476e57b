# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Picking tokens and accepting guesses: with Paddle's operators, and what decides whether the CUDA kernels do it. The
kernels are in test_cuda_kernels.py; no card is here, and what Paddle says of one stands in."""

import gc
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from conftest import host_left_out, stand_in_for_a_card

from paddlemix.external_ops import pick_token as module
from paddlemix.external_ops.pick_token import accept_tokens, pick_token
from paddlemix.utils import InputError


def given(rows, positions=3, tokens=50, seed=0):
    rng = np.random.default_rng(seed)
    logits = (np.round(8 * rng.standard_normal([rows, positions, tokens])) / 4).astype(np.float32)  # some are equal
    return logits, (20 * rng.standard_normal([positions, tokens])).astype(np.float32)


def expected(logits, noise, scale, temperature, top_k, top_p, offset):
    """By a loop over positions."""
    ids = []
    for p in range(logits.shape[1]):
        values = logits[0, p] if len(logits) == 1 else logits[1, p] + np.float32(scale) * (logits[0, p] - logits[1, p])
        if noise is not None:
            values = values / np.float32(temperature)
            least = sorted(values)[-top_k] if 0 < top_k < len(values) else -np.inf
            weights = np.where(values >= least, np.exp(np.float64(values) - values.max()), 0)
            if top_p < 1:  # of the likelier ones the weight is less than top_p of all
                least = min(v for v in values if weights[values > v].sum() < np.float32(top_p) * weights.sum())
            values = np.array([v + n if v >= least else -np.inf for v, n in zip(values, noise[p], strict=True)])
        ids.append(offset + int(values.argmax()))
    return ids


def as_on_a_card(tensor):
    return SimpleNamespace(is_cpu_place=lambda: False, is_gpu_place=lambda: True, gpu_device_id=lambda: 0)


@pytest.fixture
def card(monkeypatch):
    """A card whose kernel computes as Paddle's operators do; none was looked at before."""
    found = SimpleNamespace(emu3_ops_cuda=None, warnings=[], calls=[], accept_tokens=module._accept_with_paddle)

    def kernel(*arguments):
        found.calls.append(arguments[0].shape)
        return module._with_paddle(*arguments)

    found.pick_token = kernel
    monkeypatch.setattr(paddle.Tensor, "place", property(as_on_a_card))
    stand_in_for_a_card(monkeypatch, found, module)
    for fault in (module.pick_fault, module.accept_fault):
        fault.cache_clear()
    yield found
    for fault in (module.pick_fault, module.accept_fault):
        fault.cache_clear()


SETTINGS = [(3.0, 0.7, 7, 1, 9), (1.5, 1.0, 0, 1, 0), (-1.0, 4.0, 49, 1, 2**40), (0.0, 1.0, 50, 1, 1),
            (2.0, 0.3, 1, 1, 0), (1.0, 4.0, 0, 0.9, 0), (3.0, 2.0, 20, 0.5, 7), (1.0, 1.0, 0, 1e-15, 0)]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_with_paddle(rows, settings):
    logits, noise = given(rows)
    for some in (noise, None):
        ids = pick_token(paddle.to_tensor(logits), None if some is None else paddle.to_tensor(some), *settings)
        assert ids.dtype == paddle.int64 and ids.tolist() == expected(logits, some, *settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_on_a_card_with_paddle(card, settings):
    """Without the kernel the top_k-th largest logit is looked for row by row, with the same result."""
    del card.emu3_ops_cuda
    logits, noise = given(2)
    tensors = paddle.to_tensor(logits), paddle.to_tensor(noise)
    with host_left_out():
        ids = pick_token(*tensors, *settings)
    assert ids.tolist() == expected(logits, noise, *settings)
    assert "CUDA operators are not built, `make ops`" in module.pick_fault(0) and card.warnings == []


def test_more_tokens_than_the_kernel_takes(card, monkeypatch):
    """It adds up their weights for top-p alone."""
    monkeypatch.setattr(module, "MOST_TOKENS", 49)
    logits, noise = given(2)
    tensors = paddle.to_tensor(logits), paddle.to_tensor(noise)
    for settings in SETTINGS:
        card.calls.clear()
        assert pick_token(*tensors, *settings).tolist() == expected(logits, noise, *settings)
        assert ([2, 3, 50] in card.calls) == (settings[3] == 1)


@pytest.mark.parametrize("top_k, top_p", [(5, 1), (0, 0.9)])
def test_nothing_is_left_behind(top_k, top_p):
    """Tensors that Paddle makes of numbers are not freed."""
    logits, noise = map(paddle.to_tensor, given(1))

    def objects():
        gc.collect()
        return len(gc.get_objects())

    pick_token(logits, noise, top_k=top_k, top_p=top_p)
    before = objects()
    for _ in range(200):
        pick_token(logits, noise, top_k=top_k, top_p=top_p)
    assert objects() < before + 100


def test_a_right_kernel_is_used(card):
    """After one comparison, of guidance and none, of noise and none, with and without top-k and top-p."""
    logits, noise = map(paddle.to_tensor, given(2))
    for _ in range(3):
        pick_token(logits, noise, 3.0, 1.0, 5, 0.8, 2)
    assert card.calls == [list(case[:3]) for case in module.COMPARED] + 3 * [[2, 3, 50]] and card.warnings == []


CHANGES = [{"top_k": 1}, {"top_k": -1}, {"top_p": 0.02}, {"offset": 1}, {"guidance_scale": 0.1}, {"first": 1}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_wrong_kernel_is_not_used(card, change):
    """One that keeps a token too many or too few, or takes the last of equal ones."""

    def wrong(logits, noise, scale, temperature, top_k, top_p, offset):
        card.calls.append(logits.shape)
        top_k += change.get("top_k", 0) if top_k else 0
        if change.get("first") and noise is None:
            return logits.shape[2] - 1 - module._with_paddle(logits.flip(2), None, scale, 1, 0, 1, -offset)
        scale, offset = scale + change.get("guidance_scale", 0), offset + change.get("offset", 0)
        top_p += change.get("top_p", 0) if top_p < 1 else 0
        return module._with_paddle(logits, noise, scale, temperature, top_k, top_p, offset)

    card.pick_token = wrong
    logits, noise = given(2)
    ids = pick_token(paddle.to_tensor(logits), paddle.to_tensor(noise), 3.0, 1.0, 5, 1, 2)
    assert ids.tolist() == expected(logits, noise, 3.0, 1.0, 5, 1, 2)
    assert len(card.calls) <= len(module.COMPARED)
    (words,) = card.warnings
    assert "picks other tokens" in words and "Paddle's operators are used" in words


def test_a_kernel_that_fails_is_not_used(card):
    def not_compiled(*_):
        raise OSError("(External) CUDA error(209), no kernel image is available for execution on the device.\n[more]")

    card.pick_token = not_compiled
    logits, noise = given(1)
    for _ in range(2):
        ids = pick_token(paddle.to_tensor(logits), paddle.to_tensor(noise), top_k=5)
        assert ids.tolist() == expected(logits, noise, 1, 1, 5, 1, 0)
    (words,) = card.warnings
    assert "fails on this card ((External) CUDA error(209)" in words


def test_a_single_row_of_top_p_does_not_wait_for_a_card(card, monkeypatch):
    """Paddle sorts and adds up one row by a library that does, two by kernels."""
    del card.emu3_ops_cuda
    for name in ("sort", "cumsum"):
        original = getattr(paddle.Tensor, name)

        def of_several_rows(tensor, *arguments, original=original, **named):
            assert tensor.shape[0] > 1
            return original(tensor, *arguments, **named)

        monkeypatch.setattr(paddle.Tensor, name, of_several_rows)
    logits, noise = given(1, positions=1)
    how = 1.0, 2.0, 30, 0.7, 0
    assert pick_token(*map(paddle.to_tensor, (logits, noise)), *how).tolist() == expected(logits, noise, *how)


def accepted(ids, past, picked, forced, table):
    """By a loop over rows."""
    nexts, pasts = [], []
    for row, cached, (sequence, base, end, unpicked) in zip(ids, past, table, strict=True):
        at, known, drawn = cached + unpicked - base, forced[sequence], picked[sequence]

        def token(place):
            fixed = known[min(max(at + 1 + place, 0), len(known) - 1)]  # noqa: B023
            return fixed if fixed >= 0 else drawn[min(place, len(drawn) - 1)]  # noqa: B023

        right = 1
        while right < len(drawn) and row[unpicked + right] == token(right - 1):
            right += 1
        right = max(0, min(right, end - cached - unpicked))
        pasts.append(cached + unpicked + right)
        nexts.append([token(max(right, 1) - 1 + i) for i in range(len(drawn))])
    return nexts, pasts


@pytest.mark.parametrize("picks, unpicked", [(1, 0), (1, 1), (4, 0), (5, 1), (16, 0)])
def test_accepting_guesses(picks, unpicked):
    given = module.example_of_passes(np.random.default_rng(picks), picks, unpicked)
    ids, past = accept_tokens(*map(paddle.to_tensor, given))
    assert ids.dtype == past.dtype == paddle.int64
    assert (ids.tolist(), past.tolist()) == accepted(*given)
    advanced = past.numpy() - given[1] - unpicked
    assert set(range(min(picks, 3) + 1)) <= set(advanced.tolist())


@pytest.mark.parametrize("fault", [None, "one too many", "raises"])
def test_the_kernel_that_accepts_guesses(card, fault):
    calls = []

    def kernel(*arguments):
        calls.append(arguments)
        if fault == "raises":
            raise OSError("(External) CUDA error(209)")
        ids, past = module._accept_with_paddle(*arguments)
        return ids, past + (fault is not None)

    card.accept_tokens = kernel
    given = module.example_of_passes(np.random.default_rng(7), 3, 0)
    for _ in range(2):
        ids, past = accept_tokens(*map(paddle.to_tensor, given))
        assert (ids.tolist(), past.tolist()) == accepted(*given)
    assert len(calls) == {None: 4, "one too many": 2, "raises": 1}[fault]
    words = {"one too many": "accepts other guesses", "raises": "the kernel that accepts guesses fails on this card"}
    assert [words[fault] in line for line in card.warnings] == ([True] if fault else [])


@pytest.mark.parametrize("shapes", [([3, 2, 5], [2, 5]), ([2, 5], [2, 5]), ([1, 2, 5], [1, 5]), ([2, 2, 5], [2, 2, 5])])
def test_what_is_refused(shapes):
    logits, noise = map(paddle.zeros, shapes)
    with pytest.raises(InputError, match=r"logits must be \[1 or 2, positions, tokens\] and noise"):
        pick_token(logits, noise)
