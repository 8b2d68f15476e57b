# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Properties that hold for any input. What the user gave wrong is an InputError, and never another exception.

`make test` tries a few hundred inputs of each, the same each time; `make fuzz` new ones, for as long as one likes.
"""

import argparse
import io
import json
import math
import signal
import struct
import unicodedata
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import golden
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, TiffImagePlugin
from safetensors.numpy import load_file, save, save_file

from paddlemix.commands.unfinished import Unfinished
from paddlemix.models.emu3 import (
    Emu3Config,
    Emu3ForCausalLM,
    Emu3Tokenizer,
    Emu3VisionVQConfig,
    Emu3VisionVQModel,
)
from paddlemix.models.emu3.checkpoint import open_weights
from paddlemix.models.emu3.hub import MINI_DIRECTORY
from paddlemix.models.emu3.image_grammar import ImageGrammar
from paddlemix.models.emu3.safetensors_file import DTYPES, SafetensorsFile, write_safetensors
from paddlemix.pipelines import Emu3Pipeline
from paddlemix.processors import Emu3VisionVQImageProcessor
from paddlemix.processors.emu3_processing import generate_size, largest_size
from paddlemix.processors.image_processing_emu3 import load_image, smart_resize
from paddlemix.utils import InputError


def tries(share):
    """How many inputs a property is given, of what the profile has."""
    return settings(max_examples=max(1, int(settings.default.max_examples * share)))


def unless_refused(function, *arguments, **options):
    """What it gives, None for an InputError; either within 5 s of the processor's time."""

    def stop(*signal_and_frame):
        raise AssertionError("it takes too long")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 5)
    try:
        return function(*arguments, **options)
    except InputError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer():
    return Emu3Tokenizer.from_pretrained("emu3-mini")


@pytest.fixture(scope="module")
def pipeline():
    pipeline = Emu3Pipeline("emu3-mini", dtype="float32")
    pipeline.load()
    return pipeline


@st.composite
def damaged(draw, files, most=5):
    """One of several files' bytes: bits flipped, bytes replaced, put in, left out, the end cut off."""
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "replace", "insert", "remove", "cut", "number"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "replace":
            some = draw(st.binary(min_size=1, max_size=8))
            content[at : at + len(some)] = some
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=40))
        elif kind == "remove":
            del content[at : at + draw(st.integers(1, 100))]
        elif kind == "cut":
            del content[at:]
        else:  # lengths, offsets and sizes are such numbers
            order, number = draw(st.sampled_from("<>")), draw(st.sampled_from([0, 1, 2**16, 2**31 - 1, 2**32 - 1]))
            content[at : at + 4] = struct.pack(f"{order}I", number)
    return bytes(content)


# --- the grammar of pictures

FIRST, CODES = 300, 50
GRAMMAR = ImageGrammar(
    img=203, boi=204, eoi=205, eol=206, eof=207, eos=202, pad=200, first_visual=FIRST, codebook_size=CODES,
    encode_text=lambda text: [ord(c) for c in text],
)  # fmt: skip
pictures = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, CODES - 1)
)
text_ids = st.lists(st.integers(0, 199), min_size=1, max_size=5)


@given(pictures)
def test_a_picture_is_encoded_and_decoded(codes):
    height, width = codes.shape
    ids = GRAMMAR.encode(codes)
    np.testing.assert_array_equal(GRAMMAR.decode(ids), codes)
    body = [*ids[len(GRAMMAR.head(height, width)) :], GRAMMAR.eos]
    assert len(body) == GRAMMAR.num_tokens(height, width)
    forced = [GRAMMAR.forced(height, width, i) for i in range(len(body) + 1)]
    assert all(f in (None, i) for f, i in zip(forced, body)) and forced[-1] == GRAMMAR.pad
    assert sum(f is None for f in forced) == height * width


@given(st.lists(pictures, min_size=1, max_size=4))
def test_what_is_forced_in_several_pictures(several):
    sizes = [p.shape for p in several]
    rows = GRAMMAR.forced_ids(sizes)
    for row, size in zip(rows, sizes, strict=True):
        assert row.tolist() == [-1 if f is None else f for f in (GRAMMAR.forced(*size, i) for i in range(len(row)))]


@given(pictures, st.data())
def test_the_rows_of_an_unfinished_picture(codes, data):
    height, width = codes.shape
    body = GRAMMAR.encode(codes)[len(GRAMMAR.head(height, width)) :]
    drawn = data.draw(st.integers(0, len(body)))
    rows = GRAMMAR.whole_rows(np.array(body[:drawn], np.int64), height, width)
    expected = min(height, (drawn + 1) // (width + 1))
    np.testing.assert_array_equal(rows, codes[:expected])


@given(st.lists(st.one_of(text_ids, pictures), max_size=6))
def test_a_document_is_split_where_it_was_joined(pieces):
    ids, expected = [], []
    for piece in pieces:
        if isinstance(piece, np.ndarray):
            ids += GRAMMAR.encode(piece)
            expected.append(piece.tolist())
        else:
            ids += piece
            if expected and isinstance(expected[-1], tuple):
                piece = [*expected.pop(), *piece]
            expected.append(tuple(piece))
    split = GRAMMAR.split(ids)
    assert [tuple(p) if kind == "text" else p.tolist() for kind, p in split] == expected


@given(st.lists(st.sampled_from([1, 203, 204, 205, 206, 207, 202, 200, FIRST, FIRST + 1]), max_size=60))
def test_any_ids_are_split(ids):
    rest = list(ids)
    for kind, piece in GRAMMAR.split(ids):
        if kind == "text":
            at = next(i for i in range(len(rest)) if rest[i : i + len(piece)] == piece)
            rest = rest[at + len(piece) :]
        else:
            assert piece.ndim == 2 and piece.size and piece.min() >= 0 and piece.max() < CODES
            visual = [i for i in rest if i >= FIRST][: piece.size]
            assert visual == (piece + FIRST).ravel().tolist()
            rest = rest[rest.index(GRAMMAR.eoi) + 1 :]
    assert GRAMMAR.boi in ids or len(GRAMMAR.split(ids)) <= 1


# --- sizes

sides = st.one_of(st.integers(1, 64), st.integers(1, 100_000))
areas = st.one_of(st.integers(-5, 5000), st.integers(1, 10**12))


@given(st.integers(1, 999_999), st.integers(1, 999_999), areas, st.sampled_from([1, 8, 16]))
def test_the_size_of_a_ratio(width, height, area, factor):
    """Each side is the ideal one, rounded."""
    try:
        h, w = generate_size(f"{width}:{height}", area, factor)
    except InputError:
        assert area <= 0 or min(area * height / width, area * width / height) < (factor / 2) ** 2 * 1.001
        return
    assert h > 0 and w > 0
    for side, ideal in ((h, area * height / width), (w, area * width / height)):
        assert abs(side * factor - math.sqrt(ideal)) <= factor / 2 * 1.001 + 1e-6 * math.sqrt(ideal)


@given(st.one_of(st.text(max_size=20), st.from_regex(r"\s*\d+\s*:\s*\d+\s*"), st.none(), st.integers()), areas)
def test_any_ratio(ratio, area):
    with suppress(InputError):
        h, w = generate_size(ratio, area)
        assert h > 0 and w > 0


@tries(0.5)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 3000))
def test_the_largest_size_fits(width, height, tokens):
    ratio = f"{width}:{height}"
    size = largest_size(ratio, tokens, GRAMMAR)
    if size:
        asked_for = generate_size(ratio, size[0] * size[1] * 64)
        assert max(GRAMMAR.num_tokens(*size), GRAMMAR.num_tokens(*asked_for)) <= tokens
    elif width == height:
        assert tokens < GRAMMAR.num_tokens(1, 1)


@tries(2)
@given(sides, sides, st.sampled_from([1, 8, 16]), st.integers(1, 2**21), st.integers(1, 2**21))
def test_the_size_to_which_a_picture_is_brought(height, width, factor, one, other):
    low, high = sorted([one, other])
    try:
        h, w = smart_resize(height, width, factor, low, high)
    except InputError:
        assert min(height, width) < factor or max(height, width) > 5 * min(height, width) or high < 5 * 4 * factor**2
        return
    assert h > 0 and w > 0 and h % factor == w % factor == 0
    as_it_is = [round(side / factor) * factor for side in (height, width)]
    if math.prod(as_it_is) > high:
        assert h * w <= high
        scale = math.sqrt(high / (height * width))
    elif math.prod(as_it_is) < low:
        assert h * w >= low
        scale = math.sqrt(low / (height * width))
    else:
        assert [h, w] == as_it_is
        scale = 1
    for side, own in ((h, height), (w, width)):  # the shape is kept, but for less than a step of each side
        assert abs(side - own * scale) < factor * 1.001


# --- prompts

# what a text is made of: any characters, tokens that are special or look so, marks that compose, numbers, space
SPELLED = [
    "<|extra_203|>", "<|image start|>", "<|image token|>", "<|visual token 000000|>", "<|endoftext|>", "<|", "|>",
    "<|extra_999|>", "<|<|extra_203|>|>", "e\u0301", "\u1100\u1161", "'s", " ", "  \n", "12", "你好", "\U0001f600",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(SPELLED), st.text(max_size=10)), max_size=8).map("".join)


@given(texts)
def test_a_text_is_encoded_and_decoded(tokenizer, text):
    plain = tokenizer.encode(text, allow_special=False)
    assert all(i < tokenizer.eod_id for i in plain)  # no special token from text
    same = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(plain) == tokenizer.decode(tokenizer.encode(text)) == same
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == same
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == tokenizer.encode(text)
    assert tokenizer.encode(same) == tokenizer.encode(text)


@given(st.text(st.characters(codec=None), max_size=20))
def test_any_string_is_encoded_or_refused(tokenizer, text):
    """Halves of surrogate pairs are no characters."""
    with suppress(InputError):
        assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)


@given(st.lists(st.one_of(st.integers(0, 13207), st.integers()), max_size=20), st.booleans())
def test_any_ids_are_decoded_or_refused(tokenizer, ids, skip):
    if all(0 <= i < len(tokenizer) for i in ids):
        assert tokenizer.batch_decode([ids], skip) == [tokenizer.decode(ids, skip)]
        assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids
    else:
        for function in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
            with pytest.raises(InputError, match="token id"):
                function(ids)


@given(
    st.lists(texts, min_size=1, max_size=4),
    st.sampled_from([False, True, "longest", "max_length"]),
    st.sampled_from(["left", "right"]),
    st.one_of(st.none(), st.integers(-2, 40)),
    st.booleans(),
    st.sampled_from([None, "np"]),
)
def test_a_batch_of_texts(tokenizer, some, padding, side, length, truncation, kind):
    with suppress(InputError):
        batch = tokenizer(some, padding, side, length, truncation, kind)
        assert len(batch.input_ids) == len(some)
        for text, ids, mask in zip(some, batch.input_ids, batch.attention_mask, strict=True):
            own = [int(i) for i, m in zip(ids, mask, strict=True) if m]
            assert own == tokenizer.encode(text)[: length if truncation else None]
            start = len(ids) - len(own) if side == "left" else 0
            assert list(mask) == [int(start <= i < start + len(own)) for i in range(len(ids))]


@given(st.lists(texts, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9))
def test_a_drawing_prompt(pipeline, some, width, height):
    """Its special tokens are those of the picture, whatever the text spells."""
    processor, tokenizer = pipeline.processor, pipeline.processor.tokenizer
    batch = processor(some, mode="G", ratio=f"{width}:{height}", image_area=width * height * 64)
    assert batch.image_size == [[height, width]] * len(some)
    head = [tokenizer.boi_token_id, *tokenizer.encode(f"{height}*{width}"), tokenizer.img_token_id]
    for text, ids in zip(some, batch.input_ids, strict=True):
        assert ids[0] == tokenizer.bos_token_id and ids[-len(head) :] == head
        own = ids[1 : -len(head)]
        assert own == tokenizer.encode(text, allow_special=False) and all(i < tokenizer.eod_id for i in own)


@tries(0.2)
@given(texts)
def test_a_question_prompt(pipeline, text):
    processor, grammar = pipeline.processor, pipeline.processor.grammar
    batch = processor(text, Image.new("RGB", (32, 32), "red"), mode="U")
    pieces = grammar.split(batch.input_ids[0])
    assert [kind for kind, _ in pieces] == ["text", "picture", "text"]
    assert processor.tokenizer.decode(pieces[2][1]) == unicodedata.normalize("NFC", f"{text}. ASSISTANT:")
    special = [i for _, ids in pieces[::2] for i in ids if i >= processor.tokenizer.eod_id]
    assert special == [processor.tokenizer.bos_token_id]


numbers = st.one_of(
    st.none(), st.integers(-3, 100), st.integers(), st.floats(), st.sampled_from([1.0, 0.5, 10**30, 2**63, 2**31, 1e39])
)


@given(
    st.dictionaries(st.sampled_from(["guidance_scale", "temperature", "top_k", "top_p", "seed"]), numbers, max_size=3)
)
def test_any_sampling_values(pipeline, values):
    generation = unless_refused(pipeline.generate_steps, "a", height=16, width=16, **values)
    if generation:
        json.dumps([generation.settings, generation.metadata(0)])
        assert next(iter(generation)) >= 1


whole = st.one_of(st.none(), st.integers(-3, 200), st.integers(-(10**40), 10**40))


@tries(0.5)
@given(whole, whole, st.one_of(st.integers(-1, 20), st.integers()), st.one_of(st.none(), st.text(max_size=9)))
def test_any_size_is_taken_or_refused_at_once(pipeline, height, width, number, ratio):
    generation = unless_refused(
        pipeline.generate_steps, "a", height=height, width=width, num_images=number, ratio=ratio
    )
    if generation:
        assert len(generation.sizes) == number and all(min(size) > 0 for size in generation.sizes)


# --- configurations

json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 70), st.integers(), st.floats(), st.text(max_size=10),
        st.sampled_from([10_000, 2**31 - 1, 2**31, 2**63, 10**30, 1e308, 1e-300, [1] * 5000]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
MINI_CONFIG, MINI_VISION_CONFIG, MINI_PREPROCESSOR, MINI_TOKENIZER = (
    json.loads((MINI_DIRECTORY / name).read_text(encoding="utf-8"))
    for name in (
        "language_model/config.json", "vision_tokenizer/config.json", "vision_tokenizer/preprocessor_config.json",
        "language_model/tokenizer_config.json",
    )  # fmt: skip
)


def changed(config, *more):
    """A configuration of which some keys have other values, or of which some are gone, or that has others."""
    names = st.one_of(st.sampled_from([*config, *more]), st.text(max_size=8), st.sampled_from(["self", "__class__"]))
    return st.builds(
        lambda values, gone: {k: v for k, v in {**config, **values}.items() if k not in gone},
        st.dictionaries(names, json_values, min_size=1, max_size=3),
        st.sets(st.sampled_from(list(config)), max_size=2),
    )


def written(folder, name, content):
    """A folder that holds a configuration: of values, or of bytes."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


PIECES = ["rope_parameters", "rope_scaling", "quantization_config", "num_key_value_heads", "_name_or_path"]


@tries(3)
@given(changed(MINI_CONFIG, *PIECES))
def test_any_configuration_of_a_language_model(folder, values):
    check_configuration(folder, Emu3Config, values)


@tries(3)
@given(changed(MINI_VISION_CONFIG))
def test_any_configuration_of_a_vision_tokenizer(folder, values):
    check_configuration(folder, Emu3VisionVQConfig, values)


def check_configuration(folder, kind, values):
    """It is refused, or it is written and read again, the same."""
    config = unless_refused(kind.from_pretrained, written(folder, "config.json", values))
    if config is not None:
        repr(config)
        config.save_pretrained(folder)
        assert kind.from_pretrained(folder) == config


@given(damaged([json.dumps(c).encode() for c in (MINI_CONFIG, MINI_VISION_CONFIG)]))
def test_a_damaged_configuration(folder, content):
    written(folder, "config.json", content)
    unless_refused(Emu3Config.from_pretrained, folder)
    unless_refused(Emu3VisionVQConfig.from_pretrained, folder)


def linked(source, folder):
    """A folder that holds a checkpoint's other files."""
    folder.mkdir(exist_ok=True)
    for path in Path(source).iterdir():
        if not (folder / path.name).exists() and path.suffix != ".json":
            (folder / path.name).symlink_to(path)
    return folder


SMALL_CONFIG, SMALL_VISION_CONFIG = golden("language_model.json"), golden("vision_tokenizer.json")


@given(changed(SMALL_CONFIG, *PIECES))
def test_any_configuration_beside_the_weights(folder, language_dir, values):
    """It is refused before a layer is made, or the model computes."""
    import paddle

    there = written(linked(language_dir, folder / "language"), "config.json", values)
    model = unless_refused(Emu3ForCausalLM.from_pretrained, there)
    if model is not None:
        logits = model(paddle.to_tensor([[1, 2, 3]])).logits
        assert logits.shape == [1, 3, 512] and np.isfinite(logits.numpy()).all()


@tries(0.2)
@given(changed(SMALL_VISION_CONFIG))
def test_any_configuration_beside_the_weights_of_a_vision_tokenizer(folder, vision_dir, values):
    there = written(linked(vision_dir, folder / "vision"), "config.json", values)
    unless_refused(Emu3VisionVQModel.from_pretrained, there)


INDEX = json.dumps({"metadata": {"total_size": 9}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()


@given(
    st.one_of(
        damaged([INDEX]), json_values, changed({"weight_map": {}}),
        st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=3), json_values, max_size=3)}),
    )
)  # fmt: skip
def test_any_index_of_shards(folder, content):
    there = folder / "index"
    there.mkdir(exist_ok=True)
    (there / "model-00001-of-00001.safetensors").write_bytes(SAFETENSORS[1])
    unless_refused(open_weights, written(there, "model.safetensors.index.json", content))


@given(st.one_of(changed(MINI_PREPROCESSOR), damaged([json.dumps(MINI_PREPROCESSOR).encode()])))
def test_any_configuration_of_the_image_processor(folder, values):
    processor = unless_refused(
        Emu3VisionVQImageProcessor.from_pretrained, written(folder, "preprocessor_config.json", values)
    )
    if processor is not None:
        processor.save_pretrained(folder)
        again = Emu3VisionVQImageProcessor.from_pretrained(folder)
        added = {"size": 0, "image_processor_type": 0}  # by saving
        same = [{**vars(p), "other_keys": {**p.other_keys, **added}} for p in (again, processor)]
        assert json.dumps(same[0], sort_keys=True) == json.dumps(same[1], sort_keys=True)


@tries(0.5)
@given(st.one_of(changed(MINI_TOKENIZER, "errors", "padding_side"), damaged([json.dumps(MINI_TOKENIZER).encode()])))
def test_any_configuration_of_the_tokenizer(folder, values):
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        with suppress(FileExistsError):
            (folder / name).symlink_to(MINI_DIRECTORY / "language_model" / name)
    tokenizer = unless_refused(Emu3Tokenizer.from_pretrained, written(folder, "tokenizer_config.json", values))
    if tokenizer is not None:
        assert tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"
        assert 0 <= tokenizer.pad_token_id < len(tokenizer)
        unless_refused(tokenizer.decode, [0xFF])
        unless_refused(tokenizer, ["a", "b c"], "max_length")


# --- safetensors files


SAFETENSORS = [
    save({}),
    save({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}),
    save({
        "one.weight": np.ones([4, 3], np.float16), "two": np.zeros([0, 5], np.int64), "three": np.float32(2.0)[None],
        "four": np.arange(7, dtype=np.uint8), "five": np.float64([np.pi]),
    }),
]  # fmt: skip
entry_numbers = st.one_of(st.integers(0, 30), st.integers(), st.sampled_from([2**64 - 1, 2**63, 2**32]), st.floats())
headers = st.dictionaries(
    st.sampled_from(["a", "b", "", "__metadata__", "é"]),
    st.one_of(
        json_values,
        st.fixed_dictionaries({
            "dtype": st.one_of(st.sampled_from([*DTYPES, "BOOL", "F8_E4M3", "I16", "f32"]), json_values),
            "shape": st.one_of(st.lists(entry_numbers, max_size=3), json_values),
            "data_offsets": st.one_of(st.lists(entry_numbers, max_size=3), json_values),
        }),
    ),
    max_size=3,
)  # fmt: skip


def with_header(header, length, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@tries(5)
@given(
    st.one_of(
        damaged(SAFETENSORS),
        st.builds(
            with_header, headers, st.sampled_from([None, None, None, 0, 1, 2**40, 2**64 - 1]), st.binary(max_size=40)
        ),
        st.binary(max_size=100),
    ),
    st.sampled_from(["float32", "float16"]),
)
def test_any_safetensors_file(folder, content, dtype):
    """It is read as the library reads it, or refused."""
    path = folder / "model.safetensors"
    path.unlink(missing_ok=True)  # not written in place: the last one may still be mapped
    path.write_bytes(content)
    file = unless_refused(SafetensorsFile, path)
    if file is None:
        return
    expected = load_file(path) if "BF16" not in file.dtypes.values() else {}
    for name, shape in file.shapes.items():
        array = unless_refused(file.read, name, dtype)
        if array is not None:
            assert array.dtype == dtype and list(array.shape) == list(shape)
        if array is not None and name in expected:
            with np.errstate(all="ignore"):
                np.testing.assert_array_equal(array, expected[name].astype(dtype))
    file.close()


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=10).filter(lambda name: name != "__metadata__"),
        st.sampled_from(["float32", "float16", "float64", "int64", "int8", "uint8"]).flatmap(
            lambda dtype: hnp.arrays(
                dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=5),
                elements={"allow_nan": False} if dtype.startswith("f") else None,
            )
        ),
        max_size=5,
    )
)  # fmt: skip
def test_a_safetensors_file_is_written_and_read(folder, arrays):
    path = folder / "written.safetensors"
    path.unlink(missing_ok=True)
    write_safetensors(path, {name: (str(a.dtype), a.shape) for name, a in arrays.items()}, arrays.get)
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, arrays[name])
    if arrays:
        save_file(arrays, path)
        file = SafetensorsFile(path)
        assert file.shapes.keys() == arrays.keys() and file.sizes == {n: a.nbytes for n, a in arrays.items()}
        for name, array in arrays.items():
            read = unless_refused(file.read, name, array.dtype)
            assert read is None and not np.isfinite(array).all() or (read == array).all()
        file.close()


# --- token files

DRAWN = [np.arange(40), np.array([], np.int64), np.arange(7)]
SETTINGS = {"prompt": ["a", "b", "c"], "seed": 1}


def token_file(**content):
    file = io.BytesIO()
    np.savez_compressed(file, **content)
    return file.getvalue()


WHOLE = token_file(settings=json.dumps(SETTINGS), **{f"drawn_{i}": row for i, row in enumerate(DRAWN)})
any_arrays = hnp.arrays(
    st.sampled_from(["int64", "int8", "uint8", "float32", "bool", "U3", "complex64", "datetime64[s]"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@tries(5)
@given(
    st.one_of(
        damaged([WHOLE]),
        st.builds(
            lambda settings, more: token_file(settings=settings, **more),
            st.one_of(changed(SETTINGS).map(json.dumps), json_values.map(json.dumps), st.just(json.dumps(SETTINGS))),
            st.dictionaries(st.sampled_from(["drawn_0", "drawn_1", "drawn_2", "drawn_3", "x"]), any_arrays, max_size=4),
        ),
        st.builds(lambda settings: token_file(settings=settings), any_arrays),
        st.binary(max_size=60),
    )
)
def test_any_token_file(tmp_path_factory, content):
    """Its settings and integers of one dimension, or a line that names it."""
    folder = tmp_path_factory.getbasetemp() / "tokens"
    folder.mkdir(exist_ok=True)
    path = folder / "result_0.tokens.npz"
    path.write_bytes(content)
    try:
        unfinished = Unfinished(argparse.Namespace(output_dir=str(folder), resume=True), SETTINGS)
    except InputError as error:
        assert "result_0.tokens.npz" in str(error)
        return
    if unfinished.drawn is None:
        assert not content
    else:
        assert len(unfinished.drawn) == 3 and all(d.ndim == 1 and d.dtype.kind == "i" for d in unfinished.drawn)
        assert unfinished.settings["prompt"] == SETTINGS["prompt"]


visual = st.integers(920, 13207)


@tries(0.5)
@example([np.zeros([0, 0], np.int64)])
@given(
    st.one_of(
        st.lists(st.lists(st.one_of(visual, st.sampled_from([912, 913, 919, 709, -1, 2**62])), max_size=9), max_size=2),
        st.lists(any_arrays, max_size=2),
        st.lists(st.lists(visual, min_size=2, max_size=2).map(lambda row: [*row, 912]), max_size=3).map(
            lambda rows: [sum(rows, [])]
        ),
    )
)
def test_any_tokens_are_gone_on_with_or_refused(pipeline, drawn):
    """What was drawn stays, and the grammar holds."""
    generation = pipeline.generate_steps("a", height=16, width=16, seed=1, guidance_scale=1)
    drawn = [row if isinstance(row, np.ndarray) else np.array(row, np.int64) for row in drawn]
    if unless_refused(lambda: generation.resume(drawn, 1) or True):
        assert len(drawn) == 1 and generation.gained in (len(drawn[0]), generation.tokens)
        for _ in generation:
            pass
        [ids] = generation.drawn()
        assert ids[: len(drawn[0])].tolist() == drawn[0].tolist()
        assert ids[2] == 912 and ids.max() < 13208


# --- pictures


def image_file(kind, mode="RGB", size=(12, 9), **options):
    rng, file = np.random.default_rng(0), io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, [*size[::-1], 3], np.uint8)).convert("RGBA").convert("RGB")
    image = image.convert("L").convert(mode) if mode in ("1", "I;16", "I", "F", "LA") else image.convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


exif = Image.Exif()
exif[0x0112] = 6  # to be turned
EXIF = exif.tobytes()
frames = [Image.new("P", (12, 9), i) for i in range(3)]
tags = TiffImagePlugin.ImageFileDirectory_v2()
tags[270] = "a description"
FILES = [
    *(image_file("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    image_file("PNG", "P", transparency=3, dpi=(72, 72)),
    image_file("PNG", exif=EXIF),
    image_file("JPEG", exif=EXIF), image_file("JPEG", "L", progressive=True), image_file("JPEG", "CMYK"),
    image_file("WEBP"), image_file("WEBP", "RGBA", lossless=True, exif=EXIF),
    image_file("GIF", "P", save_all=True, append_images=frames, transparency=1),
    image_file("TIFF", tiffinfo=tags), image_file("TIFF", "CMYK"), image_file("TIFF", "F"), image_file("TIFF", "I;16"),
    *(image_file("TIFF", compression=c) for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
    image_file("TIFF", "1", compression="group4"),
    image_file("BMP"), image_file("BMP", "P"), image_file("PPM"), image_file("TGA", compression="tga_rle"),
    image_file("ICO", "RGBA", size=(16, 16)), image_file("JPEG2000"), image_file("PCX"), image_file("SGI"),
]  # fmt: skip


@st.composite
def png_with_chunks(draw):
    """A PNG whose checksums are right, of chunks that are not: what is behind the checksum is read then."""
    source = draw(st.sampled_from([f for f in FILES if f.startswith(b"\x89PNG")]))
    chunks, at = [], 8
    while at < len(source):
        [length] = struct.unpack(">I", source[at : at + 4])
        chunks.append((source[at + 4 : at + 8], source[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(draw(st.integers(1, 3))):
        place, kind = draw(st.integers(0, len(chunks) - 1)), draw(st.sampled_from(["damage", "double", "new", "drop"]))
        name, data = chunks[place]
        if kind == "damage":
            chunks[place] = name, draw(damaged([data], 2))
        elif kind == "double":
            chunks.insert(place, (name, data))
        elif kind == "drop" and len(chunks) > 1:
            del chunks[place]
        else:
            names = b"IHDR PLTE IDAT tRNS gAMA iCCP tEXt zTXt iTXt eXIf pHYs acTL fcTL fdAT cHRM sRGB IEND abCd".split()
            compressed = st.binary(max_size=20).map(lambda content: b"k\0\0" + zlib.compress(content))
            data = draw(st.one_of(st.binary(max_size=40), compressed))
            chunks.insert(place, (draw(st.sampled_from(names)), data))
    return source[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def test_the_pictures_themselves_are_read(folder):
    for i, content in enumerate(FILES):
        (folder / f"whole_{i}").write_bytes(content)
        assert sorted(load_image(folder / f"whole_{i}").size) in ([9, 12], [16, 16])


@tries(8)
@example(image_file("PNG", exif=EXIF[:-6]))  # EXIF of which an end is missing
@given(st.one_of(damaged(FILES), damaged(FILES, 1), png_with_chunks(), st.binary(max_size=100)))
def test_any_picture_file(folder, content):
    """Pixels in range, or a line; nothing is printed."""
    path = Path(folder) / "picture"
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        image = unless_refused(load_image, path)
        assume(image is None or max(image.size) < 3000)  # to save time
        pixels = image and unless_refused(Emu3VisionVQImageProcessor(min_pixels=64, max_pixels=4096), image)
    assert not shown
    if pixels:
        values = pixels["pixel_values"]
        assert values.shape[:2] == (1, 3) and values.size <= 3 * 4096 and np.abs(values).max() <= 1


arrays = hnp.arrays(
    st.sampled_from(["uint8", "uint8", "uint8", "float32", "bool", "int64", "uint16"]),
    hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=12),
)


@given(arrays)
def test_any_array_as_a_picture(array):
    pixels = unless_refused(Emu3VisionVQImageProcessor(min_pixels=64, max_pixels=4096), array)
    if pixels is not None:
        assert array.dtype == np.uint8 and pixels["pixel_values"].shape[:2] == (1, 3)
        assert np.abs(pixels["pixel_values"]).max() <= 1
