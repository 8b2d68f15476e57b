# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model against the original's numbers, and against itself another way."""

import contextlib

import numpy as np
import paddle
import pytest
from conftest import golden, relative_error

from paddlemix import external_ops
from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM, Emu3Model, attention
from paddlemix.models.emu3 import cache as cache_module
from paddlemix.models.emu3 import modeling_emu3 as modeling
from paddlemix.models.emu3.linear import linear

DATA = golden("language_model.npz")
IDS, MASK = paddle.to_tensor(DATA["padded_ids"]), paddle.to_tensor(DATA["padded_mask"])
LABELS = paddle.where(MASK == 1, IDS, paddle.full_like(IDS, -100))


def logits_of(model, *args, **kwargs):
    with paddle.no_grad():
        return model(*args, **kwargs).logits.numpy()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("plain", {}),
        ("linear", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24}),
    ],
)
def test_golden_logits(language_dir, name, config):
    model = Emu3ForCausalLM.from_pretrained(language_dir, **config)
    logits = logits_of(model, paddle.to_tensor(DATA[f"{name}_ids"]))
    assert relative_error(logits, DATA[f"{name}_logits"]) < 1e-5


def test_golden_left_padded_batch(language_model):
    with paddle.no_grad():
        output = language_model(IDS, MASK, labels=LABELS)
    real = DATA["padded_mask"] == 1
    assert relative_error(output.logits.numpy()[real], DATA["padded_logits"][real]) < 1e-5
    assert float(output.loss) == pytest.approx(float(DATA["loss"]), rel=1e-6)


def test_padding_changes_nothing(language_model):
    alone = logits_of(language_model, IDS[:1, 7:])
    padded = logits_of(language_model, IDS, MASK)[:1, 7:]
    assert relative_error(padded, alone) < 1e-5


def test_given_position_ids_count(language_model):
    shifted = logits_of(language_model, IDS[1:], position_ids=paddle.arange(5, 25).unsqueeze(0))
    assert relative_error(shifted, logits_of(language_model, IDS[1:])) < 1e-4  # rotary positions are relative
    other = logits_of(language_model, IDS[1:], position_ids=2 * paddle.arange(20).unsqueeze(0))
    assert relative_error(other, logits_of(language_model, IDS[1:])) > 1e-2


def test_in_pieces_through_the_cache(language_model):
    whole = logits_of(language_model, IDS, MASK)
    cache = language_model.make_cache(2, 20)
    pieces = [
        logits_of(language_model, IDS[:, a:b], MASK[:, :b], past_key_values=cache)
        for a, b in [(0, 9), (9, 10), (10, 16), (16, 20)]
    ]
    assert relative_error(np.concatenate(pieces, axis=1)[:, 7:], whole[:, 7:]) < 1e-5
    with pytest.raises(ValueError, match="do not fit a cache"):
        language_model.model(IDS[:, :1], past_key_values=cache)


def test_a_cache_grows_in_blocks(language_model, monkeypatch):
    monkeypatch.setattr(cache_module, "CACHE_BLOCK", 8)
    cache, capacities = language_model.make_cache(2, 20), []
    pieces = []
    for a, b in [(0, 7), (7, 8), (8, 9), (9, 20)]:
        pieces.append(logits_of(language_model, IDS[:, a:b], MASK[:, :b], past_key_values=cache))
        capacities.append(cache.capacity)
    assert capacities == [8, 8, 16, 20]
    whole = logits_of(language_model, IDS, MASK)
    assert relative_error(np.concatenate(pieces, axis=1)[:, 7:], whole[:, 7:]) < 1e-5


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("way", [contextlib.nullcontext, external_ops.without_operators])
def test_a_padded_row_through_the_cache(language_model, monkeypatch, way, new):
    """Few tokens over the cache, one row left-padded, against all tokens at once."""
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 200, [2, 40]))
    mask = paddle.ones_like(ids)
    mask[0, :7] = 0
    monkeypatch.setattr(Emu3Model, "_has_step", lambda *_: False)
    with way():
        whole = logits_of(language_model, ids, mask)
        cache = language_model.make_cache(2, 40)
        pieces = [logits_of(language_model, ids[:, :20], mask[:, :20], past_key_values=cache)]
        for end in range(20 + new, 41, new):
            pieces.append(
                logits_of(language_model, ids[:, end - new : end], mask[:, :end], past_key_values=cache)
            )  # fmt: skip
    assert relative_error(np.concatenate(pieces, axis=1)[:, 7:], whole[:, 7:]) < 1e-5


def test_a_gradient_goes_another_way(language_model, monkeypatch):
    monkeypatch.setattr(attention, "cached_attention", None)
    language_model(paddle.to_tensor([[1, 2, 3]]), labels=paddle.to_tensor([[1, 2, 3]])).loss.backward()
    language_model.clear_gradients()


def test_the_cache_that_forward_gives_grows(language_model):
    """The usual loop by hand, one token at a time."""
    with paddle.no_grad():
        output = language_model(IDS[:, :5])
        for i in range(5, 20):
            output = language_model(IDS[:, i : i + 1], past_key_values=output.past_key_values)
    assert output.past_key_values.length == 20
    assert relative_error(output.logits[:, 0].numpy(), logits_of(language_model, IDS)[:, -1]) < 1e-5
    assert language_model(IDS[:, :5], use_cache=False).past_key_values is None


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_chunks(monkeypatch, masked):
    """Against the formula, spelled out in float64."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    rng = np.random.RandomState(0)
    query, key, value = (
        rng.standard_normal(s).astype("float32") for s in ([2, 10, 6, 8], [2, 3, 13, 8], [2, 3, 13, 8])
    )
    allowed = np.ones([2, 13], dtype=bool)
    allowed[0, :2] = not masked
    mask = paddle.to_tensor(allowed).reshape([2, 1, 1, 13]) if masked else None
    out = attention.attend(*map(paddle.to_tensor, (query, key, value)), attention.Mask(3, 10, mask))
    expected = np.zeros([2, 10, 6, 8])
    for b, q, h in np.ndindex(2, 10, 6):
        seen = np.flatnonzero(allowed[b] & (np.arange(13) <= q + 3))
        scores = key[b, h // 2, seen].astype("float64") @ query[b, q, h] / np.sqrt(8)
        weights = np.exp(scores - scores.max())
        expected[b, q, h] = weights @ value[b, h // 2, seen] / weights.sum()
    assert relative_error(out.numpy(), expected.reshape(2, 10, 48)) < 1e-5


def additive(visible):
    return paddle.where(visible, paddle.zeros([]), paddle.full([], -1e4))


def test_masks_of_four_axes(language_model):
    """Bool, 0 and 1, and additive ones; padding alone and a whole matrix."""
    expected = logits_of(language_model, IDS, MASK)[:, 7:]
    padding = (MASK == 1).reshape([2, 1, 1, 20])
    matrix = paddle.logical_and(padding, paddle.ones([20, 20]).tril().astype("bool"))
    for mask in (padding, padding.astype("int64"), additive(padding), matrix, additive(matrix)):
        assert relative_error(logits_of(language_model, IDS, mask)[:, 7:], expected) < 1e-5
    ids, _ = language_model.generate(IDS, attention_mask=padding, max_new_tokens=24)
    np.testing.assert_array_equal(ids.numpy(), DATA["greedy"][:, 20:])


def test_two_sequences_packed_in_one_row(language_model):
    """A block-diagonal mask: each is what it is alone."""
    block = paddle.zeros([20, 20])
    block[:8, :8] = block[8:, 8:] = 1
    positions = paddle.concat([paddle.arange(8), paddle.arange(12)]).unsqueeze(0)
    packed = logits_of(language_model, IDS[1:], block.astype("bool").reshape([1, 1, 20, 20]), position_ids=positions)
    assert relative_error(packed[:, :8], logits_of(language_model, IDS[1:, :8])) < 1e-5
    assert relative_error(packed[:, 8:], logits_of(language_model, IDS[1:, 8:])) < 1e-5


def test_generate_without_padding_takes_flash_attention(language_model, monkeypatch):
    """Every layer's prefill, though PaddleNLP always makes a mask."""
    calls = []
    monkeypatch.setattr(attention, "_has_flash_attention", lambda query: calls.append(query.shape[1]) or False)
    with external_ops.without_operators():
        for mask in (None, paddle.ones_like(IDS[1:])):
            calls.clear()
            language_model.generate(IDS[1:], attention_mask=mask, max_new_tokens=4)
            assert calls == [20] * 3
        calls.clear()
        language_model.generate(IDS[:1], attention_mask=MASK[:1], max_new_tokens=4)
        assert calls == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": IDS[0]}, r"input_ids must be \[batch, new\]"),
        ({"input_ids": IDS[:, :0]}, "input_ids must be"),
        ({"input_ids": IDS, "position_ids": paddle.arange(20)}, "position_ids must be"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels must be"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 2}, "labels must be"),
        ({"input_ids": IDS, "attention_mask": MASK.reshape([2, 1, 20])}, "attention_mask must be"),
        ({"input_ids": IDS, "attention_mask": (MASK - 1) * 1e4}, "holds negatives"),
    ],
)
def test_shapes_that_do_not_fit(language_model, arguments, words):
    with pytest.raises(ValueError, match=words):
        language_model(**arguments)


def test_generate_refuses_embeddings(language_model):
    with pytest.raises(ValueError, match="no inputs_embeds"):
        language_model.generate(inputs_embeds=language_model.get_input_embeddings()(IDS), max_new_tokens=2)


@pytest.mark.parametrize("shape", [[1, 1], [2, 1], [1, 4], [2, 3], [3, 5]])
def test_linear_of_few_rows_and_many(shape):
    rng = np.random.RandomState(0)
    x, weight = rng.standard_normal([*shape, 16]), rng.standard_normal([24, 16])
    y = linear(paddle.to_tensor(x, "float32"), paddle.to_tensor(weight, "float32"))
    assert relative_error(y.numpy(), x @ weight.T) < 1e-5


def test_flash_attention_is_given_what_it_can_do(monkeypatch):
    """Which calls take it. Its kernel needs a card; Paddle's stand-in on a CPU says that it means the same."""
    rng, calls = np.random.RandomState(0), []
    query, key, value = (paddle.to_tensor(rng.standard_normal([2, 4, 5, 8]).astype("float32")) for _ in range(3))
    query = query.transpose([0, 2, 1, 3])
    real = attention.flash_attention
    cases = [
        (query, attention.Mask(0, 5)),
        (query[:, :1], attention.Mask(4, 1)),
        (query[:, :3], attention.Mask(2, 3)),
        (query, attention.Mask(0, 5, paddle.ones([2, 1, 1, 5], dtype="bool"))),
    ]
    plain = [attention.attend(q, key, value, mask) for q, mask in cases]
    monkeypatch.setattr(attention, "_has_flash_attention", lambda query: True)
    monkeypatch.setattr(attention, "flash_attention", lambda *a, **how: calls.append(how["causal"]) or real(*a, **how))
    for (q, mask), expected in zip(cases, plain, strict=True):
        assert relative_error(attention.attend(q, key, value, mask).numpy(), expected.numpy()) < 1e-5
    assert calls == [True]  # prefill; not over the cache, not with padding


def test_when_there_is_flash_attention(monkeypatch):
    class Query:
        def __init__(self, gpu=True, dtype=paddle.bfloat16, head_dim=128):
            self.place, self.dtype, self.shape = self, dtype, [1, 1, 1, head_dim]
            self.is_gpu_place = lambda: gpu

    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (8, 0))
    assert attention._has_flash_attention(Query())
    assert not attention._has_flash_attention(Query(gpu=False))
    assert not attention._has_flash_attention(Query(dtype=paddle.float32))
    assert not attention._has_flash_attention(Query(head_dim=512))
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (7, 5))
    assert not attention._has_flash_attention(Query())


@pytest.mark.parametrize("mask", [MASK, None])
def test_golden_greedy_generate(language_model, mask):
    ids, _ = language_model.generate(IDS, attention_mask=mask, max_new_tokens=24, decode_strategy="greedy_search")
    np.testing.assert_array_equal(ids.numpy(), DATA["greedy"][:, 20:])


def test_beam_search(language_model, monkeypatch):
    """With the cache, more tokens than it has at first, and without: PaddleNLP drops use_cache=False on its way."""
    beams = {"max_new_tokens": 70, "decode_strategy": "beam_search", "num_beams": 3}
    ids, _ = language_model.generate(IDS, attention_mask=MASK, **beams)
    prepare, lengths = language_model.prepare_inputs_for_generation, []

    def without_cache(input_ids, **kwargs):
        inputs = prepare(input_ids, **{**kwargs, "use_cache": False})
        lengths.append(inputs["input_ids"].shape[1])
        return inputs

    monkeypatch.setattr(language_model, "prepare_inputs_for_generation", without_cache)
    again, _ = language_model.generate(IDS[:1, 7:], **beams)
    assert lengths[:3] == [13, 14, 15]
    length = again.shape[1]
    np.testing.assert_array_equal(ids.numpy()[:1, :length], again.numpy())
    assert (ids.numpy()[0, length:] == 200).all()  # the shorter answer is padded


def test_sampling(language_model):
    paddle.seed(0)
    ids, _ = language_model.generate(
        IDS, attention_mask=MASK, max_new_tokens=9, decode_strategy="sampling", top_k=4, num_return_sequences=2
    )
    assert ids.shape == [4, 9]
    for row, prompt, mask in zip(ids, IDS.repeat_interleave(2, 0), MASK.repeat_interleave(2, 0), strict=True):
        whole = paddle.concat([prompt[mask == 1], row]).unsqueeze(0)
        ranks = (-logits_of(language_model, whole)[0, -10:-1]).argsort(-1)[:, :4]
        assert all(token in best for token, best in zip(row.tolist(), ranks, strict=True))


def test_a_batch_stops_on_eos_row_by_row(language_model):
    greedy = DATA["greedy"][:, 20:]
    eos = int(greedy[0, 3])
    assert eos not in greedy[0, :3] and eos not in greedy[1, :4]
    ids, _ = language_model.generate(IDS, attention_mask=MASK, max_new_tokens=24, eos_token_id=eos, pad_token_id=200)
    np.testing.assert_array_equal(ids.numpy()[0, :4], greedy[0, :4])
    assert (ids.numpy()[0, 4:] == 200).all()
    length = ids.shape[1]
    np.testing.assert_array_equal(ids.numpy()[1], greedy[1, :length])


def test_logits_for_the_last_positions_alone(language_model):
    whole = logits_of(language_model, IDS, MASK)
    last = logits_of(language_model, IDS, MASK, logits_to_keep=2)
    assert last.shape == (2, 2, 512)
    assert relative_error(last, whole[:, -2:]) < 1e-5
    assert language_model.prepare_inputs_for_generation(IDS)["logits_to_keep"] == 1


def test_embeddings_in_place_of_ids_and_plain_tuples(language_model):
    with paddle.no_grad():
        embeddings = language_model.get_input_embeddings()(IDS)
        logits, cache = language_model(attention_mask=MASK, inputs_embeds=embeddings, return_dict=False)
    assert relative_error(logits.numpy(), logits_of(language_model, IDS, MASK)) < 1e-5
    assert cache.length == 20
    with pytest.raises(ValueError, match="one of the two"):
        language_model(IDS, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="attention_mask must be"):
        language_model(IDS, MASK[:, 1:])


def gradients(model):
    model.clear_gradients()
    paddle.seed(1)  # of dropout
    model(IDS, MASK, labels=LABELS).loss.backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(language_dir):
    model = Emu3ForCausalLM.from_pretrained(language_dir).train()
    plain = gradients(model)
    calls = []
    original = modeling.Emu3DecoderLayer.forward
    modeling.Emu3DecoderLayer.forward = lambda self, *args: calls.append(1) or original(self, *args)
    try:
        model.gradient_checkpointing_enable()
        checkpointed = gradients(model)
    finally:
        modeling.Emu3DecoderLayer.forward = original
    assert len(calls) == 2 * 3  # forward, and once more in backward
    assert all(relative_error(checkpointed[name], plain[name]) < 1e-5 for name in plain)


def test_gradient_checkpointing_with_frozen_embeddings(language_dir):
    """What fine-tuning of the layers alone does: the first layer's input needs no gradient."""
    model = Emu3ForCausalLM.from_pretrained(language_dir, attention_dropout=0.0).train()
    model.get_input_embeddings().weight.stop_gradient = True
    model.gradient_checkpointing_enable()
    model(IDS, MASK, labels=LABELS).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["model.embed_tokens.weight"]
    model.gradient_checkpointing_disable()
    assert not model.model.enable_recompute


def test_gradient_of_the_loss(language_dir):
    """Against a central difference along a random direction of one weight."""
    model = Emu3ForCausalLM.from_pretrained(language_dir)
    weight = model.model.layers[1].self_attn.k_proj.weight
    direction = np.random.RandomState(0).standard_normal(weight.shape).astype("float32")
    slope = float((gradients(model)["model.layers.1.self_attn.k_proj.weight"] * direction).sum())
    start, losses = weight.numpy().copy(), []
    for step in (1e-3, -1e-3):
        weight.set_value(start + step * direction)
        losses.append(float(model(IDS, MASK, labels=LABELS).loss))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=0.02)


def test_dropout_only_in_training(language_dir):
    model = Emu3ForCausalLM.from_pretrained(language_dir)
    assert model.config.attention_dropout == 0.1
    np.testing.assert_array_equal(logits_of(model, IDS, MASK), logits_of(model, IDS, MASK))
    model.train()
    paddle.seed(1)
    first = logits_of(model, IDS, MASK)
    assert relative_error(first, logits_of(model, IDS, MASK)) > 1e-3


def test_dropout_of_what_the_original_drops(language_dir, monkeypatch):
    model, dropped, dropout = Emu3ForCausalLM.from_pretrained(language_dir).train(), [], modeling.F.dropout

    def watched(x, p, **options):
        dropped.append((tuple(x.shape), p))
        return dropout(x, p, **options)

    monkeypatch.setattr(modeling.F, "dropout", watched)
    logits_of(model, IDS, MASK)
    of_hidden = ((*IDS.shape, model.config.hidden_size), 0.1)
    of_layer = [kind for kind in dropped[1:] if kind == of_hidden]
    assert dropped[0] == of_hidden and len(of_layer) == 2 * model.config.num_hidden_layers
    assert len(dropped) == 1 + 3 * model.config.num_hidden_layers  # and of attention's probabilities


def test_tied_embeddings(tmp_path):
    config = Emu3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = Emu3ForCausalLM(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = paddle.to_tensor([[1, 2, 3]])
    before = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    again = Emu3ForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    np.testing.assert_array_equal(logits_of(again, ids), before)
    again.train()
    again(ids, labels=ids).loss.backward()


def test_the_transformer_alone_from_the_same_checkpoint(language_dir, language_model, tmp_path):
    model = Emu3Model.from_pretrained(language_dir)
    model.save_pretrained(tmp_path)
    for same in (model, Emu3Model.from_pretrained(tmp_path)):
        with paddle.no_grad():
            np.testing.assert_array_equal(same(IDS).numpy(), language_model.model(IDS).numpy())


def test_released_names_and_shapes():
    with paddle.LazyGuard():
        model = Emu3ForCausalLM(Emu3Config())
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == golden("layout-Emu3-8B.json")


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_few_tokens_train_one_projection_alone(language_dir, name):
    """The operators for few tokens give no gradient: they must not stand in for any that is wanted."""
    model = Emu3ForCausalLM.from_pretrained(language_dir)
    for parameter in model.parameters():
        parameter.stop_gradient = True
    weight = getattr(model.model.layers[0].self_attn, name).weight
    weight.stop_gradient = False
    ids = paddle.to_tensor(DATA["plain_ids"])[:, :8]
    model(ids, labels=ids).loss.backward()
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0
