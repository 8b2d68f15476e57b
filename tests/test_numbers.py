# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Numbers and forms that callers give: what is taken is taken exactly, the rest is refused with one line."""

import json
import math
import time

import ml_dtypes
import numpy as np
import paddle
import pytest
from PIL import Image

from paddlemix.models.emu3 import (
    Answer,
    Batch,
    Drawing,
    Emu3ForCausalLM,
    Emu3Model,
    Emu3VisionVQModel,
    Sampling,
    generate_images,
    generate_text,
)
from paddlemix.models.emu3.utils_emu3 import UnbatchedClassifierFreeGuidanceLogitsProcessor
from paddlemix.pipelines import Emu3Pipeline
from paddlemix.utils import InputError, whole_numbers

FRACTIONS = [3.0, 2.5, np.float32(3), np.array(3.0), paddle.to_tensor(3.0), True, np.True_, paddle.to_tensor(True)]
FRACTIONS += ["3", None, [3], math.nan, paddle.to_tensor(3.0).astype("bfloat16"), ml_dtypes.bfloat16(3), 2**70]
WHOLE = [3, np.int64(3), np.uint8(3), np.array(3), paddle.to_tensor(3), paddle.to_tensor(3, dtype="int32")]


@pytest.fixture(scope="module")
def emu3():
    pipeline = Emu3Pipeline.from_pretrained("emu3-mini", dtype="float32")
    pipeline.load()
    return pipeline


def refused(words, call, *arguments, **options):
    with pytest.raises(InputError, match=words) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400


# --- whole numbers


@pytest.mark.parametrize("value", FRACTIONS, ids=repr)
def test_no_number_is_cut_to_a_whole_one(emu3, value):
    grammar, prompt = emu3.processor.grammar, emu3.processor("a ring").input_ids[0]
    for name in ("seed", "top_k"):
        refused(f"^{name} must be", Sampling, **{name: value})
        if value is not None:
            refused(f"^{name} must be", emu3.understand_steps, None, "?", **{name: value})
            refused(f"^{name} must be", emu3.generate_steps, "a ring", **{name: value})
    refused("num_images must be", emu3.generate_steps, "a ring", num_images=value)
    refused("max_new_tokens must be", Answer, [1, 2], value, emu3.config)
    refused("size in tokens must be", Drawing, prompt, (2, value), grammar, None, 1)
    refused("codes must be", grammar.encode, [[1, value]])
    refused("codes must be", emu3.processor.decode_image, [[1, value]])
    refused("ids must be whole numbers", emu3.processor.decode, [5, value])
    refused("is not a token id|ids must be", emu3.processor.tokenizer.decode, [5, value])
    refused("ids must be whole numbers", Answer, [5, value], 1, emu3.config)
    refused("ids must be whole numbers", Drawing, [value, grammar.img], (2, 2), grammar, None, 1)
    refused("number must be", Answer, [5], 1, emu3.config, number=value)
    refused("number must be", Drawing, prompt, (2, 2), grammar, None, 1, number=value)
    if value is not None:
        refused("height and width must be", emu3.generate_steps, "a ring", height=value, width=value)
        refused("window must be", Batch, emu3.model, window=value)
        refused("max_new_tokens must be", emu3.understand_steps, None, "?", max_new_tokens=value)


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers_of_any_kind(emu3, value):
    assert Sampling(seed=value, top_k=value) == Sampling(seed=3, top_k=3)
    assert type(Sampling(seed=value).seed) is int  # as JSON takes it
    assert Answer([1, 2], value, emu3.config).max_new_tokens == 3
    grammar = emu3.processor.grammar
    assert Drawing([value, grammar.img], (value, value), grammar, None, 1).size == (3, 3)
    assert grammar.encode([[value, 1]]) == grammar.encode([[3, 1]])
    assert emu3.processor.tokenizer.decode(value) == emu3.processor.tokenizer.decode([3])
    assert emu3.processor.tokenizer.convert_ids_to_tokens(value) == emu3.processor.tokenizer.convert_ids_to_tokens(3)
    generation = emu3.generate_steps("a ring", seed=value, top_k=value, num_images=value, height=64, width=64)
    assert len(generation.drawings) == 3 and json.loads(json.dumps(generation.settings))["top_k"] == 3


def test_whole_numbers_keep_their_value_and_shape():
    largest = 2**63 - 1
    assert whole_numbers("n", largest).tolist() == largest
    assert whole_numbers("n", np.array([largest], "uint64")).tolist() == [largest]
    assert whole_numbers("n", [[1, 2], [3, 4]]).shape == (2, 2) and whole_numbers("n", []).shape == (0,)
    assert whole_numbers("n", [paddle.to_tensor([1, 2]), np.array([3, 4])]).tolist() == [[1, 2], [3, 4]]
    shapes = [np.zeros((2, 3), "int64"), np.zeros((2, 4), "int64")]
    for bad in (np.array([2**63], "uint64"), 2**63, [[1], [2, 3]], {}, shapes, ["x" * 9000], [[[0.5]]]):
        refused("^n must be whole numbers", whole_numbers, "n", bad)
    refused("from 0 to 5, got", whole_numbers, "n", [1, 6], 0, 5)


# --- numbers that float32 holds


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e39, 1e-50, 10**400, "1", None, True])
def test_what_float32_does_not_hold_is_refused(emu3, value):
    for name in ("temperature", "top_p"):
        refused(f"^{name} must be above 0", Sampling, **{name: value})
    if value is not None:
        for name in ("temperature", "top_p", "guidance_scale"):
            refused(f"^{name} must be", emu3.generate_steps, "a ring", **{name: value})
    prompt, grammar = emu3.processor("a ring").input_ids[0], emu3.processor.grammar
    refused("^guidance_scale must be a finite", Drawing, prompt, (2, 2), grammar, prompt, value)
    refused("^guidance_scale must be a finite", UnbatchedClassifierFreeGuidanceLogitsProcessor, value, emu3.model, None)


def test_the_smallest_and_largest_are_exact():
    """The likeliest token is still the likeliest one, where a logit over the smallest temperature is largest."""
    logits = paddle.to_tensor([-40.0, 60.0, 1e4, 70.0])
    assert int(Sampling(temperature=1e-15).pick(1e15 * logits, paddle.zeros([4]))) == 2
    assert int(Sampling(top_p=1e-15, top_k=0).pick(logits, paddle.zeros([4]))) == 2
    refused("^temperature must be above 0", Sampling, temperature=1e-38)  # 1e4 and 70 would both be infinite


def test_numbers_of_any_kind(emu3):
    for value in (np.float32(0.5), np.array(0.5), paddle.to_tensor(0.5)):
        assert Sampling(temperature=value, top_p=value) == Sampling(temperature=0.5, top_p=0.5)
        settings = emu3.generate_steps("a ring", guidance_scale=value, temperature=value).settings
        assert json.loads(json.dumps(settings))["guidance_scale"] == 0.5


def test_an_area_that_cannot_be(emu3):
    for area in (math.inf, math.nan, 1e300, "many", None):
        refused("image_area must be", emu3.processor, "a ring", image_area=area)


# --- prompts in every form of the processor


FORMS = [(form, padding, side) for form in (None, "np", "pd") for padding, side in ((True, "left"), (True, "right"))]
FORMS += [(None, False, None)]


@pytest.fixture(scope="module")
def prompts(emu3):
    """(of drawings, negative ones, of questions), unpadded lists of different lengths"""
    texts, image = ["a ring", "a large red circle on white"], Image.new("RGB", (64, 64), "red")
    size, question = {"ratio": ["1:1", "2:1"], "image_area": 32 * 32}, {"image": [image] * 2, "mode": "U"}
    calls = [(texts, size), (["blurry", "low quality, grey"], size), (texts, question)]
    return lambda **form: [emu3.processor(text, **how, **form) for text, how in calls]


@pytest.fixture(scope="module")
def expected(emu3, prompts):
    drawing, negative, question = ([list(row) for row in batch.input_ids] for batch in prompts())
    assert len(set(map(len, drawing))) == len(set(map(len, question))) == 2
    grammar, sampling = emu3.processor.grammar, Sampling(seed=5)
    pictures = generate_images(emu3.model, drawing, [(4, 4), (3, 6)], grammar, negative, 2.0, sampling)
    return pictures.codes, [[ids[0] for ids in generate_text(emu3.model, [row], 4)] for row in question]


@pytest.mark.parametrize(("form", "padding", "side"), FORMS)
def test_prompts_as_the_processor_returns_them(emu3, prompts, expected, form, padding, side):
    drawing, negative, question = prompts(return_tensors=form, padding=padding, padding_side=side)
    codes = generate_images(
        emu3.model, drawing.input_ids, drawing.image_size, emu3.processor.grammar, negative.input_ids, 2.0,
        Sampling(seed=5),
    ).codes  # fmt: skip
    for ours, theirs in zip(codes, expected[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    answers = list(generate_text(emu3.model, question.input_ids, 4))
    for i, answer in enumerate(expected[1]):
        assert [ids[i] for ids in answers][: len(answer)] == answer
    answer = Answer(question.input_ids[0], 4, emu3.config)  # and by themselves, as a service takes them
    assert answer.prompts == Answer(prompts()[2].input_ids[0], 4, emu3.config).prompts


def test_prompts_that_are_none(emu3):
    size, grammar = [(2, 2)], emu3.processor.grammar
    for prompts in (5, [5], np.array([1.5]), paddle.to_tensor([1, 2]), ["a ring"], [None], [[]], [], [[[1]]]):
        refused("prompt", lambda prompts=prompts: list(generate_text(emu3.model, prompts)))
        refused("prompt", generate_images, emu3.model, prompts, size, grammar, None, 1)
    refused("ids must be whole numbers", generate_images, emu3.model, np.array([[1.5]]), size, grammar, None, 1)


# --- PaddleNLP's generate, and forward


def test_generate_says_that_it_wants_padding_on_the_left(emu3):
    pad, model = emu3.config.pad_token_id, emu3.model
    left, right = paddle.to_tensor([[pad, 5, 6], [5, 6, 7]]), paddle.to_tensor([[5, 6, pad], [5, 6, 7]])
    refused("padded on the left, not on the right", model.generate, right, max_new_tokens=1)
    mask = paddle.to_tensor([[1, 1, 0], [1, 1, 1]])
    refused("padded on the left", model.generate, input_ids=right, attention_mask=mask, max_new_tokens=1)
    refused("padded on the left", model.generate, right, attention_mask=mask.astype("bool").reshape([2, 1, 1, 3]))
    for bad in (left.tolist(), left.numpy(), left.astype("float32"), left[0], [[5, 6], [5]]):
        refused("left-padded input_ids, a Paddle tensor int64 .*padding_side=.left.", model.generate, bad)
    refused("attention_mask as a Paddle tensor", model.generate, left, attention_mask=mask.tolist())
    ids, _ = model.generate(left, attention_mask=(left != pad).astype("int64"), max_new_tokens=2)
    assert ids[:1].tolist() == model.generate(left[:1, 1:], max_new_tokens=2)[0].tolist()


def test_forward_takes_tensors_of_whole_numbers(emu3):
    ids = paddle.to_tensor([[5, 6, 7]])
    for bad in ([[5, 6]], np.array([[5, 6]]), ids.astype("float32"), ids.astype("bool")):
        refused("input_ids must be a Paddle tensor of int64 or int32", emu3.model, bad)
        refused("labels must be int64", emu3.model, ids, labels=bad)


@pytest.mark.parametrize("length", [1, 4])
def test_the_loss_of_no_labels_is_zero(language_model, length):
    ids = paddle.to_tensor([[5, 6, 7, 8], [8, 7, 6, 5]])[:, :length]
    loss = language_model(ids, labels=paddle.full(ids.shape, -100, "int64")).loss
    loss.backward()
    gradients = [p.grad for p in language_model.parameters() if p.grad is not None]
    assert float(loss) == 0 and loss.dtype == paddle.float32 and gradients
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients)
    language_model.clear_gradients()


@pytest.mark.parametrize("model", [Emu3ForCausalLM, Emu3Model, Emu3VisionVQModel])
def test_float16_weights_on_a_cpu(model):
    for dtype in ("float16", paddle.float16):
        refused("^a CPU cannot compute with float16 weights: take float32", model.from_pretrained, "emu3-mini", dtype)
    refused("bfloat16 weights: take float32$", Emu3VisionVQModel.from_pretrained, "emu3-mini", "bfloat16")


# --- pixels and texts


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 255.0, -11.0])
def test_pixels_far_from_minus_one_to_one(vision_model, bad):
    for place in ((0, 0, 0, 0), (0, 1, 8, 5), (0, 2, 15, 15)):
        pixels = paddle.zeros([1, 3, 16, 16])
        pixels[place] = bad
        refused(r"pixel_values must be in \[-1, 1\], got", vision_model.encode, pixels)
        refused(r"pixel_values must be in \[-1, 1\]", vision_model.encode, pixels.expand([1, 4, 3, 16, 16]))


def test_pixels_a_little_beyond(vision_model):
    """Decoded pixels and those of other means are encoded as they are."""
    paddle.seed(0)
    with paddle.no_grad():
        vision_model.encode(paddle.randn([1, 3, 16, 16]))
        vision_model.encode(vision_model.decode(vision_model.encode(paddle.ones([1, 3, 16, 16]))))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" " * 10**6, "too many spaces"),
        ("\t" * 10**6 + "x", "too many spaces"),
        ("\u0301" * 10**6, "more than 256 combining marks"),
        ("a" + "\u0301\u0323" * 500_000, "more than 256 combining marks"),
        ("\u0f73" * 10**6, "more than 256 combining marks"),  # of two marks each, in the wrong order
    ],
    ids=["spaces", "tabs", "marks", "marks of two classes", "marks of two"],
)
def test_texts_that_would_take_long(emu3, text, words):
    start = time.perf_counter()
    refused(words, emu3.processor.tokenizer.encode, text)
    refused(words, emu3.generate_steps, text)
    assert time.perf_counter() - start < 3  # a second each, on a machine that others use


def test_many_marks_and_spaces_are_read(emu3):
    """As many as are taken, in any order: what is written is what is read, in Unicode's order."""
    tokenizer = emu3.processor.tokenizer
    text = "a" + "\u0301\u0323" * 128  # acute above, dot below
    assert tokenizer.decode(tokenizer.encode(text)) == "\u1ea1" + "\u0323" * 127 + "\u0301" * 128
    for spaces in (" " * 900_000, "\u4e2d " * 300_000):
        start = time.perf_counter()
        assert tokenizer.decode(tokenizer.encode(spaces)) == spaces
        assert time.perf_counter() - start < 3


# --- the original processor's methods


def test_the_original_processors_methods(emu3):
    processor, vision = emu3.processor, emu3.vision_tokenizer
    pixels = emu3.image_processor(Image.new("RGB", (64, 64), "red"), return_tensors="pd").pixel_values
    codes = processor.vision_encode(pixels)
    assert codes.stop_gradient and codes.tolist() == vision.encode(pixels).tolist()
    with paddle.no_grad():
        expected = vision.decode(codes)
    np.testing.assert_array_equal(processor.vision_decode(codes).numpy(), expected.numpy())
    eol = processor.tokenizer.eol_token
    wanted = f"<|visual token 000001|><|visual token 000002|>{eol}<|visual token 000030|><|visual token 000004|>"
    for form in (paddle.to_tensor, np.array, list):
        assert processor.to_imgstr(form([[1, 2], [30, 4]])) == wanted
    refused("image_tokens must be", processor.to_imgstr, [[1.0]])
    refused("image_tokens must be", processor.to_imgstr, [[-1]])
    refused("image_tokens must be", processor.to_imgstr, [1])
    # by hand: sides of sqrt(518400 / (w * h)) times the ratio's, in units of 8 pixels, rounded
    for ratio, size in (("1:1", (90, 90)), ("16:9", (68, 120)), ("9:16", (120, 68)), ("4:3", (78, 104))):
        assert processor.calculate_generate_size(ratio, 518400, 8) == size
