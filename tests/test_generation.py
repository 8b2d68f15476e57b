# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pictures and answers: the original's tokens, sampling, and pieces for PaddleNLP's own loop."""

import contextlib
import os

import numpy as np
import paddle
import pytest
from conftest import golden
from paddlenlp.generation import MaxLengthCriteria, StoppingCriteriaList
from paddlenlp.generation.logits_process import LogitsProcessorList, PrefixConstrainedLogitsProcessor

from paddlemix.external_ops import without_operators
from paddlemix.models.emu3 import ImageGrammar, generate_images, generate_text, passes, windows
from paddlemix.models.emu3.decoding import Batch
from paddlemix.models.emu3.generation_emu3 import make_drawings
from paddlemix.models.emu3.sampling import Sampling
from paddlemix.models.emu3.utils_emu3 import (
    Emu3PrefixConstrainedLogitsHelper,
    EosTokenCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)  # fmt: skip

DATA = golden("language_model.npz")
GREEDY = Sampling(top_k=1)
GRAMMAR = ImageGrammar(
    img=203, boi=204, eoi=205, eol=206, eof=207, eos=202, pad=200, first_visual=256, codebook_size=256
)
SIZES = list(zip(DATA["cfg_height"].tolist(), DATA["cfg_width"].tolist(), strict=True))


def unpadded(ids, mask):
    return [row[keep == 1].tolist() for row, keep in zip(ids, mask, strict=True)]


PROMPTS = unpadded(DATA["cfg_prompt"], DATA["cfg_mask"])
NEGATIVE = DATA["cfg_negative"].tolist()


def golden_codes():
    """By the grammar's definition: what follows IMG, w codes and EOL a row."""
    prompt = DATA["cfg_prompt"].shape[1]
    for ids, (h, w) in zip(DATA["cfg_output"], SIZES, strict=True):
        yield ids[prompt : prompt + h * (w + 1)].reshape(h, w + 1)[:, :-1] - 256


def decode(model, drawings, decoding="auto", window=None, passes=10**6):
    """(tokens gained by each step, forward passes) of at most so many steps"""
    batch, gained = Batch(model, decoding, window), []
    batch.join(*drawings)
    while batch and batch.forward_passes < passes:
        gained.append(sum(tokens for _, tokens in batch.step()))
    return gained, batch.forward_passes


def test_golden_guided_pictures(language_model):
    """Two pictures of different sizes in one batch, prompts of different lengths."""
    drawings = make_drawings(PROMPTS, SIZES, GRAMMAR, NEGATIVE, 3.0, GREEDY)
    gained, passes = decode(language_model, drawings, "step")
    for drawing, expected in zip(drawings, golden_codes(), strict=True):
        np.testing.assert_array_equal(drawing.codes(), expected)
    assert sum(gained) == sum(GRAMMAR.num_tokens(h, w) for h, w in SIZES)
    assert SIZES == [(3, 5), (4, 3)] and passes == 15  # as many as the larger picture has codes
    pictures = generate_images(language_model, PROMPTS, SIZES, GRAMMAR, NEGATIVE, 3.0, GREEDY)
    for codes, expected in zip(pictures.codes, golden_codes(), strict=True):
        np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (4, 2)])
def test_narrow_pictures(language_model, size):
    [codes] = generate_images(language_model, PROMPTS[:1], [size], GRAMMAR, NEGATIVE[:1], sampling=GREEDY).codes
    assert codes.shape == size


def test_a_picture_does_not_depend_on_its_neighbours_when_greedy(language_model):
    both = generate_images(language_model, PROMPTS, SIZES, GRAMMAR, NEGATIVE, sampling=GREEDY).codes
    alone = generate_images(language_model, PROMPTS[1:], SIZES[1:], GRAMMAR, NEGATIVE[1:], sampling=GREEDY).codes
    np.testing.assert_array_equal(alone[0], both[1])


def test_no_guidance_is_the_prompt_alone(language_model):
    [codes] = generate_images(language_model, PROMPTS[:1], SIZES[:1], GRAMMAR, None, 1, GREEDY).codes
    ids = list(PROMPTS[0])
    for position in range(SIZES[0][0] * (SIZES[0][1] + 1) - 1):
        forced = GRAMMAR.forced(*SIZES[0], position)
        with paddle.no_grad():
            logits = language_model(paddle.to_tensor([ids])).logits[0, -1].numpy()
        ids.append(256 + int(logits[256:].argmax()) if forced is None else forced)
    np.testing.assert_array_equal(codes, GRAMMAR.decode(ids))


def test_a_seed_gives_the_same_picture_and_another_seed_another(language_model):
    def draw(seed, rows=1):
        sampling = Sampling(seed=seed)
        prompts, sizes = PROMPTS[:1] * rows, SIZES[:1] * rows
        return generate_images(language_model, prompts, sizes, GRAMMAR, NEGATIVE[:1] * rows, sampling=sampling).codes

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1)[0] != draw(2)[0]).any()
    first, second = draw(1, rows=2)
    np.testing.assert_array_equal(first, draw(1)[0])
    assert (first != second).any()


@pytest.mark.parametrize("drawn", golden("drawn.json"), ids=lambda d: f"{d['sampling']}-{d['guidance_scale']}")
def test_seeds_give_the_pictures_they_gave_at_first(language_model, drawn):
    """Recorded from this project's first sampler: a seed written in a picture's metadata stays good."""
    pictures = generate_images(
        language_model, PROMPTS, SIZES, GRAMMAR, NEGATIVE, drawn["guidance_scale"], Sampling(**drawn["sampling"])
    )
    assert [codes.tolist() for codes in pictures.codes] == drawn["codes"]


@pytest.mark.parametrize("guidance_scale", [3.0, 1])
@pytest.mark.parametrize(
    ("sizes", "window"), [([(4, 3)], 1), ([(3, 5), (4, 3)], 4), ([(1, 1), (2, 6)], 3), ([(3, 4)] * 2, 50)]
)
def test_jacobi_draws_the_same_pictures(language_model, sizes, window, guidance_scale):
    """Where noise decides (high temperatures), guesses made from wrong neighbours are mostly right; else few are."""
    prompts, negative = PROMPTS[: len(sizes)], NEGATIVE[: len(sizes)]
    for seed, settings in enumerate([{}, {"top_k": 1}, {"top_p": 0.9}, {"temperature": 4}, {"temperature": 100}]):
        how = prompts, sizes, GRAMMAR, negative, guidance_scale, Sampling(seed=seed, **settings)
        step = generate_images(language_model, *how, decoding="step")
        drawings = make_drawings(*how)
        gained, passes = decode(language_model, drawings, "jacobi", window)
        for drawing, expected in zip(drawings, step.codes, strict=True):
            np.testing.assert_array_equal(drawing.codes(), expected)
        assert sum(gained) == sum(GRAMMAR.num_tokens(h, w) for h, w in sizes)
        assert [len(drawing.drawn()) for drawing in drawings] == [h * (w + 1) - 1 for h, w in sizes]
        assert passes <= step.forward_passes
    assert passes < 0.7 * step.forward_passes


def test_auto_takes_the_window_that_promises_most(monkeypatch):
    """Tokens of a pass over its time, by tables that are simple to follow."""
    monkeypatch.setattr(windows, "GAINS", [1, 1.5, 1.75, 2, 2.4, 2.6, 4])
    monkeypatch.setattr(windows, "ROWS", [2, 4, 8, 32, 64])
    flat, linear = [1, 1, 1.25, 4, 8], [1, 2, 4, 16, 32]
    for rows, costs, luck, expected in [
        (1, flat, 1, 5),  # 2.4 / 1.125, where 3 gives 2 / 1 and 7 gives 2.6 / 1.25
        (2, flat, 1, 3),  # 2 / 1.25, where 1 gives 1.5 / 1
        (2, flat, 0.5, 1),  # 1.25 / 1, where 3 gives 1.5 / 1.25
        (2, flat, 0.08, 0),  # 1.04 / 1 is not worth it
        (4, flat, 1, 1),  # 1.5 / 1.25
        (4, flat, 0.5, 0),  # 1.25 / 1.25
        (16, flat, 1, 0),
        (2, flat, 0, 0),
        (1, linear, 1, 1),  # one row takes as long as two
        (2, linear, 1, 0),
        (2, linear, 2.5, 1),  # 2.25 / 2, where 2 gives 2.875 / 3
    ]:
        assert windows.choose_window("auto", None, rows, costs, luck) == expected, (rows, luck)
        assert windows.choose_window("step", None, rows, costs, luck) == 0
        assert windows.choose_window("jacobi", 5, rows, costs, luck) == 5
        assert windows.choose_window("jacobi", None, rows, costs, luck) == 15
    assert windows.choose_window("auto", None, 2, None) == 15


def test_a_forked_process_makes_threads_of_its_own():
    """Those of its parent are not in it, and would be waited for."""
    assert passes.at_once([lambda: 1, lambda: 2]) == [1, 2] and passes._threads.cache_info().currsize == 1
    child = os.fork()
    if child == 0:
        os._exit(passes._threads.cache_info().currsize)
    assert os.waitpid(child, 0)[1] == 0


def test_the_measured_tables_are_whole():
    assert len(windows.WINDOWS) == len(windows.GAINS)
    for costs in (*windows.COSTS.values(), windows.WITHOUT_OPERATORS):
        assert len(costs) == len(windows.ROWS) and sorted(costs) == list(costs) and costs[0] == 1
        chosen = [windows.choose_window("auto", None, rows, costs) for rows in (1, 2, 4, 8, 16, 32)]
        assert chosen == sorted(chosen, reverse=True) and chosen[0] > 0 == chosen[-1]
    assert list(windows.GAINS) == sorted(windows.GAINS) and windows.GAINS[0] == 1


@pytest.mark.parametrize("operators", [True, False])
@pytest.mark.parametrize("guidance_scale", [3.0, 1])
def test_auto_draws_the_same_pictures(language_model, guidance_scale, operators):
    """Windows come and go with the luck of the guesses: hot noise makes most of them right, cold logits wrong."""
    with contextlib.nullcontext() if operators else without_operators():
        for seed, settings in enumerate([{}, {"top_k": 1}, {"temperature": 100, "top_k": 0}]):
            for sizes in ([(6, 7)], [(3, 5), (6, 3)]):
                prompts, negative = PROMPTS[: len(sizes)], NEGATIVE[: len(sizes)]
                how = prompts, sizes, GRAMMAR, negative, guidance_scale, Sampling(seed=seed, **settings)
                step = generate_images(language_model, *how, decoding="step")
                drawings = make_drawings(*how)
                gained, passes = decode(language_model, drawings, "auto")
                for drawing, expected in zip(drawings, step.codes, strict=True):
                    np.testing.assert_array_equal(drawing.codes(), expected)
                assert sum(gained) == sum(GRAMMAR.num_tokens(h, w) for h, w in sizes)
                assert passes <= step.forward_passes


def test_a_picture_learns_how_often_it_guesses_right():
    """Whether it guesses or not."""
    for window in (0, 1, 3):
        [wrong], [right] = (make_drawings(PROMPTS[:1], [(9, 50)], GRAMMAR, None, 1, GREEDY) for _ in range(2))
        for drawing, same in ((wrong, False), (right, True)):
            for i in range(40):
                ids, count = drawing.feed(10**6, window)
                drawing.accept(len(ids), 256 + (0 * np.arange(count) if same else (np.arange(count) + i * 7) % 200 + 1))
        assert wrong.luck < 0.4 < 2 < right.luck
        again = windows.choose_window("auto", None, 2, windows.COSTS["float32"], right.luck)
        assert windows.choose_window("auto", None, 2, windows.COSTS["int8"], wrong.luck) == 0 < again


@pytest.mark.parametrize("how", ["step", "jacobi", "auto"])
@pytest.mark.parametrize("sizes", [[(4, 3)], [(3, 5), (4, 3)], [(3, 4)] * 2])
def test_a_drawing_that_was_cut_off_goes_on_to_the_same_pictures(language_model, sizes, how):
    count = len(sizes)
    request = PROMPTS[:count], sizes, GRAMMAR, NEGATIVE[:count], 3.0, Sampling(seed=3)
    whole = make_drawings(*request)
    _, passes = decode(language_model, whole, "step")
    cut = make_drawings(*request)
    decode(language_model, cut, how, passes=4)
    within_a_row = [drawing.drawn()[: 2 + i] for i, drawing in enumerate(whole)]
    for drawn in ([d.drawn() for d in cut], within_a_row, [d.drawn() for d in whole], [w.drawn()[:0] for w in whole]):
        again = make_drawings(*request, drawn)
        gained, more = decode(language_model, again, how)
        for drawing, expected in zip(again, whole, strict=True):
            np.testing.assert_array_equal(drawing.codes(), expected.codes())
        done = sum(d.tokens if len(tokens) == len(d.drawn()) else len(tokens) for d, tokens in zip(whole, drawn))
        assert sum(gained) == sum(GRAMMAR.num_tokens(h, w) for h, w in sizes) - done
        assert more <= passes and (more == 0) == (done == sum(d.tokens for d in whole))


def frequencies(sampling, logits, draws=4000):
    logits = paddle.to_tensor(logits, dtype="float32").unsqueeze(0)
    noise = [paddle.to_tensor(sampling.noise(0, position, logits.shape[1])) for position in range(draws)]
    picked = [sampling.pick(logits, n).item() for n in noise]
    return np.bincount(picked, minlength=logits.shape[1]) / draws


def test_sampling_follows_the_softmax():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(frequencies(Sampling(), logits), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    hot = np.exp(logits / 2) / np.exp(logits / 2).sum()
    np.testing.assert_allclose(frequencies(Sampling(temperature=2.0), logits), hot, atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(top_k=2), logits), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(top_p=0.9), logits), np.array([50, 30, 15, 0]) / 95, atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(top_p=0.2), logits, 50), [1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(Sampling(top_k=1), logits, 50), [1, 0, 0, 0])


@pytest.mark.parametrize(
    "values",
    [{"temperature": 0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}],
)
def test_sampling_settings_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


def test_mistakes(language_model):
    with pytest.raises(ValueError, match="for each picture"):
        generate_images(language_model, PROMPTS, SIZES[:1], GRAMMAR, NEGATIVE)
    with pytest.raises(ValueError, match="for each picture"):
        generate_images(language_model, PROMPTS, SIZES, GRAMMAR)
    with pytest.raises(ValueError, match="end with the image token"):
        generate_images(language_model, [[1, 2]], SIZES[:1], GRAMMAR, NEGATIVE[:1])
    with pytest.raises(ValueError, match="is too large: at most 16777216"):
        generate_images(language_model, PROMPTS[:1], [(100_000, 100_000)], GRAMMAR, NEGATIVE[:1])
    with pytest.raises(ValueError, match="at least one row"):
        generate_images(language_model, PROMPTS[:1], [(0, 3)], GRAMMAR, NEGATIVE[:1])
    how = language_model, PROMPTS[:1], [(2, 2)], GRAMMAR, NEGATIVE[:1]
    with pytest.raises(ValueError, match="decoding must be one of auto, step, jacobi, got 'fast'"):
        generate_images(*how, decoding="fast")
    with pytest.raises(ValueError, match="window must be 1 or more"):
        generate_images(*how, decoding="jacobi", window=0)
    for drawn, words in [
        ([[256, 256, 256]], "cannot stand"), ([[256, 3]], "cannot stand"), ([[3]], "cannot stand"),
        ([256], "positions"), ([[256], [256]], "1 pictures, got 2"), ([[256, 256, 206, 256, 256, 206]], "at most"),
        ([[256.5]], "int64"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            generate_images(*how, drawn=drawn)
    with pytest.raises(ValueError, match="at least one prompt"):
        list(generate_text(language_model, [[]]))
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(generate_text(language_model, [[1]], 0))


def test_golden_answers(language_model):
    steps = list(generate_text(language_model, unpadded(DATA["padded_ids"], DATA["padded_mask"]), 24))
    np.testing.assert_array_equal(np.array(steps).T, DATA["greedy"][:, 20:])


def test_an_answer_ends_with_eos_and_the_others_go_on(language_model, monkeypatch):
    greedy = DATA["greedy"][:, 20:]
    eos = int(greedy[0, 3])
    monkeypatch.setattr(language_model.config, "eos_token_id", eos)
    steps = list(generate_text(language_model, unpadded(DATA["padded_ids"], DATA["padded_mask"]), 24))
    first, second = zip(*steps, strict=True)
    assert list(first[:3]) == greedy[0, :3].tolist() and set(first[3:]) == {None}
    length = list(second).index(None) if None in second else 24
    assert list(second[:length]) == greedy[1, :length].tolist()


# --- pieces for those who drive PaddleNLP's generate


def generate(model, processors, prompt=None, mask=None):
    prompt = paddle.to_tensor(DATA["cfg_prompt"]) if prompt is None else prompt
    mask = paddle.to_tensor(DATA["cfg_mask"]) if mask is None else mask
    criteria = [EosTokenCriteria(202, pad_token_id=200), MaxLengthCriteria(prompt.shape[1] + 60)]
    with paddle.no_grad():
        ids, _ = model.generate(
            prompt, attention_mask=mask, max_new_tokens=60, logits_processors=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(criteria), trunc_input=False,
        )  # fmt: skip
    return ids.numpy()


def helper(height, width):
    return Emu3PrefixConstrainedLogitsHelper(height, width, 203, 205, 202, 206, 207, 200, list(range(256, 512)))


@pytest.mark.parametrize("use_cache", [True, False])
def test_golden_guidance_through_generate_again_and_again(language_model, use_cache):
    """The same objects serve several calls, whatever was drawn in between."""
    processors = [
        UnbatchedClassifierFreeGuidanceLogitsProcessor(
            3.0, language_model, paddle.to_tensor(DATA["cfg_negative"]), use_cache=use_cache
        ),
        PrefixConstrainedLogitsProcessor(helper(DATA["cfg_height"], DATA["cfg_width"]), num_beams=1),
    ]
    np.testing.assert_array_equal(generate(language_model, processors), DATA["cfg_output"])
    prompt = paddle.to_tensor([[201, 5, 6, 204, 203], [200, 201, 7, 204, 203]])
    mask = paddle.to_tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    other = generate(language_model, processors, prompt, mask)
    assert (other[:, 5:] != DATA["cfg_output"][:, 14 : 9 + other.shape[1]]).any()
    np.testing.assert_array_equal(generate(language_model, processors), DATA["cfg_output"])


def test_guidance_of_one_is_none(language_model):
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(1, language_model, paddle.to_tensor(NEGATIVE))
    logits = np.random.RandomState(0).standard_normal([1, 512])
    expected = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(
        guidance(paddle.to_tensor([[203]]), paddle.to_tensor(logits)).numpy(), expected, atol=1e-5
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (3, 4)])
def test_the_helper_spells_a_picture(size):
    ids, allowed = [9, 203], helper(np.array([size[0]]), np.array([size[1]]))
    for position in range(GRAMMAR.num_tokens(*size) + 1):
        may_come = allowed(1, paddle.to_tensor(ids))
        forced = GRAMMAR.forced(*size, position)
        assert may_come == (list(range(256, 512)) if forced is None else [forced])
        ids.append(may_come[-1])
    with pytest.raises(ValueError, match="no image token"):
        allowed(0, paddle.to_tensor([1, 2]))


def test_eos_criteria():
    stop = EosTokenCriteria([202, 199], pad_token_id=200)
    assert stop(paddle.to_tensor([[1, 202], [202, 200]]), None) is True
    assert stop(paddle.to_tensor([[1, 202], [1, 5]]), None) is False
    assert EosTokenCriteria(202)(paddle.to_tensor([[202]]), None) is True


def test_gradients_are_the_callers_between_the_tokens_of_an_answer(language_model):
    answers = [generate_text(language_model, [[5, 6, 7]], 3) for _ in range(2)]
    for _ in zip(*answers):
        assert paddle.is_grad_enabled()
    assert paddle.is_grad_enabled()
