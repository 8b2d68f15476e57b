# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What is decided about a card's memory and number formats. No card is here: what Paddle says of one stands in."""

import gc
import weakref
from types import SimpleNamespace

import paddle
import pytest
from conftest import golden, relative_error
from test_generation import GRAMMAR, GREEDY, NEGATIVE, PROMPTS, SIZES

from paddlemix import machine, paddle_private
from paddlemix.models.emu3 import (
    Emu3Config,
    Emu3ForCausalLM,
    Emu3VisionVQConfig,
    Emu3VisionVQModel,
    cache,
    modeling_emu3visionvq,
    vision_engine,
)
from paddlemix.models.emu3.cache import cache_bytes
from paddlemix.models.emu3.decoding import Batch
from paddlemix.models.emu3.generation_emu3 import make_drawings
from paddlemix.pipelines import Emu3Pipeline
from paddlemix.utils import InputError

GB = 1e9


@pytest.fixture
def card(monkeypatch):
    """24 GB, of which other programs hold 2, and this one 9: 6 in tensors and 3 kept for what comes."""
    found = SimpleNamespace(free=13 * GB, allocated=6 * GB, reserved=9 * GB, capability=(8, 9), emptied=0, flags=[])

    def empty():
        found.emptied += 1
        found.free, found.reserved = found.free + found.reserved - found.allocated, found.allocated

    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "memory_allocated", lambda: found.allocated)
    monkeypatch.setattr(paddle.device.cuda, "memory_reserved", lambda: found.reserved)
    monkeypatch.setattr(paddle.device.cuda, "empty_cache", empty)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: found.capability)
    monkeypatch.setattr(paddle.base.core, "gpu_memory_available", lambda: found.free, raising=False)
    return found


def test_free_memory_is_the_cards_and_what_paddle_keeps(card):
    assert machine.free_memory() == 16 * GB
    machine.release_memory()
    assert card.emptied == 1 and machine.free_memory() == 16 * GB
    machine.require_memory(15.9 * GB, "for a test")
    with pytest.raises(InputError, match="17.0 GB of memory on the card for a test are needed and 16.0 GB are free"):
        machine.require_memory(17 * GB, "for a test")


def test_once_more_after_memory_is_released(card):
    """What the first try held is gone by then."""
    held = []

    def work(size):
        tensor = paddle.zeros([4])
        held.append(weakref.ref(tensor))
        if size > card.free:
            raise MemoryError("ResourceExhaustedError: Out of memory error on GPU 0")
        assert [tensor() is None for tensor in held] == [True, False]
        return size

    assert machine.with_memory_released(work, 14 * GB) == 14 * GB
    assert card.emptied == 1
    with pytest.raises(MemoryError):
        machine.with_memory_released(work, 20 * GB)
    assert card.emptied == 2


def test_a_cpu_tries_once():
    calls = []

    def work():
        calls.append(1)
        raise MemoryError

    with pytest.raises(MemoryError):
        machine.with_memory_released(work)
    assert len(calls) == 1


def test_a_step_and_a_picture_are_tried_once_more(card, language_model, vision_model, monkeypatch):
    """The same tokens and pixels as without the error."""
    expected = make_drawings(PROMPTS, SIZES, GRAMMAR, NEGATIVE, 3.0, GREEDY)
    drawings = make_drawings(PROMPTS, SIZES, GRAMMAR, NEGATIVE, 3.0, GREEDY)
    codes = paddle.to_tensor(golden("vision_tokenizer.npz")["image_codes"])
    with monkeypatch.context() as patch:
        patch.setattr(paddle, "get_device", lambda: "cpu")
        batch = Batch(language_model)
        batch.join(*expected)
        while batch:
            batch.step()
        pixels = vision_model.decode(codes).numpy()

    failing = {"model": 3, "decoder": 1}  # which call of these fails

    def fails(name, real):
        def call(*arguments):
            failing[name] -= 1
            if failing[name] == 0:
                raise MemoryError("Out of memory error on GPU 0")
            return real(*arguments)

        return call

    monkeypatch.setattr(paddle, "to_tensor", lambda array, place=None, real=paddle.to_tensor: real(array))
    monkeypatch.setattr(type(language_model.model), "step", fails("model", type(language_model.model).step))
    decoder = type(vision_model.decoder)
    monkeypatch.setattr(decoder, "decode_frames", fails("decoder", decoder.decode_frames))
    monkeypatch.setattr("paddlemix.models.emu3.passes.upload", paddle.to_tensor)
    batch = Batch(language_model)
    batch.join(*drawings)
    while batch:
        batch.step()
    assert [d.codes().tolist() for d in drawings] == [d.codes().tolist() for d in expected]
    assert (vision_model.decode(codes).numpy() == pixels).all()
    assert failing["model"] < 0 and failing["decoder"] < 0 and card.emptied == 2


def test_a_growing_cache_gives_its_old_blocks_back(card, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_BLOCK", 8)
    config = Emu3Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    kv = cache.KVCache(config, 2, 24)
    kv.reserve(7)
    assert card.emptied == 0
    kv.reserve(9)
    kv.reserve(17)
    assert card.emptied == 2


def test_a_finished_drawing_keeps_no_cache(language_model):
    """Its memory is what decoding the picture needs."""
    drawings = make_drawings(PROMPTS, SIZES, GRAMMAR, NEGATIVE, 3.0, GREEDY)
    batch = Batch(language_model)
    batch.join(*drawings)
    while batch:
        batch.step()
    kept = weakref.ref(batch.cache)
    del batch
    gc.collect()
    assert kept() is None and all(drawing.is_done for drawing in drawings)


def test_a_720_picture_takes_less_than_22_gb(monkeypatch):
    """In bfloat16, by arithmetic: the weights, then the cache, or what decoding takes."""
    asked = []
    monkeypatch.setattr(modeling_emu3visionvq, "require_memory", lambda size, purpose: asked.append(size))
    monkeypatch.setattr(vision_engine, "can_run", lambda *_: False)
    with paddle.LazyGuard():
        vision = Emu3VisionVQModel(Emu3VisionVQConfig())
    vision.require_memory_to_decode(1, 90, 90)
    weights = 2 * 8.492e9 + 4 * sum(parameter.size for parameter in vision.parameters())
    context = 0.6 * GB
    drawn = cache_bytes(Emu3Config(), 2 * (90 * 91 + 200), "bfloat16")
    assert 2 * GB < drawn < 2.4 * GB and 3 * GB < asked[0] < 3.3 * GB
    assert weights + context + max(drawn, asked[0]) < 22 * GB


@pytest.mark.parametrize("band", [1 << 22, 4000, 1])
def test_bands_compute_what_the_layers_do(band, vision_model, monkeypatch):
    """Bands of the whole picture, of some rows and of one; two pictures of an odd number of rows."""
    data = golden("vision_tokenizer.npz")
    codes = paddle.to_tensor(data["image_codes"][:, :3])
    pixels = paddle.to_tensor(data["image"][:, :, :24])
    codes.stop_gradient = True
    monkeypatch.setattr(vision_engine, "can_run", lambda *_: False)
    monkeypatch.setattr(modeling_emu3visionvq, "BAND", band)
    whole = vision_model.decode(codes).numpy(), vision_model.latents(pixels).numpy()
    with paddle.no_grad():
        banded = vision_model.decode(codes).numpy(), vision_model.latents(pixels).numpy()
    for a, b in zip(banded, whole, strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("capability, dtype", [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_float16_where_a_card_has_no_bfloat16(card, capability, dtype):
    card.capability = capability
    assert machine.half_dtype() == dtype
    assert Emu3Pipeline("emu3-mini").dtype == dtype
    assert Emu3Pipeline("emu3-mini", dtype="bfloat16").dtype == dtype
    assert Emu3Pipeline("emu3-mini", dtype="float32").dtype == "float32"


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_embedding_of_a_quantized_model_decides_its_activations(card, stored, language_dir, tmp_path, monkeypatch):
    """float16 on a card without bfloat16, whatever the checkpoint stores."""
    monkeypatch.setattr(paddle, "get_device", lambda: "cpu")
    Emu3ForCausalLM.from_pretrained(language_dir, dtype=stored).save_pretrained(tmp_path)
    monkeypatch.setattr("paddlemix.models.emu3.checkpoint.half_dtype", lambda: "float16")
    assert Emu3ForCausalLM.from_pretrained(tmp_path, dtype="int8").dtype == paddle.float16


def test_memory_to_decode_is_asked_for_once_more_when_the_model_is_loaded(monkeypatch):
    emu3 = Emu3Pipeline.from_pretrained("emu3-mini")
    generation = emu3.generate_steps("a circle", seed=1)
    emu3.load()
    monkeypatch.setattr(modeling_emu3visionvq, "require_memory", refuse)
    with pytest.raises(InputError, match="pixels at once"):
        next(iter(generation))
    assert generation.gained == 0


def refuse(size, purpose):
    raise InputError(purpose)


def test_no_tf32(monkeypatch):
    """By the flag of Paddle 3.3, and by two switches; on a card alone."""
    set_to, has_flag = [], True

    def set_flags(flags):
        if not has_flag:
            raise ValueError("Flag FLAGS_cudnn_allow_tf32 cannot set its value through this function.")
        set_to.append(flags)

    monkeypatch.setattr(paddle, "set_flags", set_flags)
    for name in ("set_cudnn_switch", "set_cublas_switch"):
        monkeypatch.setattr(paddle.base.core, name, lambda value, name=name: set_to.append((name, value)))
    monkeypatch.setattr(paddle, "set_device", lambda device: None)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 1)
    machine.start_paddle("cpu")
    assert set_to == []
    machine.start_paddle("gpu")
    switches = [("set_cudnn_switch", False), ("set_cublas_switch", False)]
    assert set_to == [{"FLAGS_cudnn_allow_tf32": False}, *switches]
    has_flag = False
    paddle_private.use_full_float32()
    assert set_to[3:] == switches
