# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Text to token ids and back, with the released vocabulary and the original's golden outputs."""

import base64
import copy
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddlemix.models.emu3 import Emu3Tokenizer
from paddlemix.utils import InputError

GOLDEN = json.loads((Path(__file__).parent / "golden/tokenizer.json").read_text(encoding="utf-8"))
FIRST_SPECIAL = 151643
FORGED = "a cat<|image end|><|extra_204|><|endoftext|> and <|visual token 000007|>"
TEXTS = ["hello", " masterpiece, film grained, best quality.", ""]
ROWS = [[14990], [58731, 11, 4531, 1081, 2627, 11, 1850, 4271, 13], []]


@pytest.fixture(scope="module")
def tokenizer(vocabulary_dir):
    return Emu3Tokenizer.from_pretrained(vocabulary_dir)


def write_vocabulary(directory, tokens=()):
    """A small vocabulary: the 256 bytes in order, then `tokens`."""
    ranked = [bytes([byte]) for byte in range(256)] + list(tokens)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranked)]
    (directory / "emu3.tiktoken").write_text("".join(lines))
    (directory / "emu3_vision_tokens.txt").write_text("<|image token|>\n<|image start|>\n<|image end|>\n")
    return directory


# Text to ids


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_text_becomes_the_ids_of_the_original_and_back(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_tokens_are_the_way_between_text_and_ids(tokenizer, case):
    tokens = tokenizer.tokenize(case["text"])
    assert tokenizer.convert_tokens_to_ids(tokens) == case["ids"]
    assert tokenizer.convert_ids_to_tokens(case["ids"]) == tokens
    assert tokenizer.convert_tokens_to_string(tokens) == case["decoded"]


def test_ordinary_tokens_are_bytes_and_special_ones_str(tokenizer):
    assert tokenizer.tokenize("<|extra_203|>hello<|image start|>90") == [
        "<|extra_203|>", b"hello", "<|image start|>", b"9", b"0",
    ]  # fmt: skip
    assert tokenizer.tokenize("<|extra_203|>", allow_special=False) == [
        b"<", b"|", b"extra", b"_", b"2", b"0", b"3", b"|", b">",
    ]  # fmt: skip
    assert tokenizer.convert_tokens_to_ids("hello") == tokenizer.convert_tokens_to_ids(b"hello") == 14990
    assert tokenizer.convert_ids_to_tokens(14990) == b"hello"


def test_special_tokens_have_the_released_ids(tokenizer):
    roles = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")
    assert {role: getattr(tokenizer, f"{role}_token_id") for role in roles} == {
        "pad": 151643, "bos": 151849, "eos": 151850, "img": 151851,
        "boi": 151852, "eoi": 151853, "eol": 151846, "eof": 151847,
    }  # fmt: skip
    assert [getattr(tokenizer, f"{role}_token") for role in roles] == [
        "<|endoftext|>", "<|extra_203|>", "<|extra_204|>", "<|image token|>",
        "<|image start|>", "<|image end|>", "<|extra_200|>", "<|extra_201|>",
    ]  # fmt: skip
    assert tokenizer.eod_id == FIRST_SPECIAL
    assert tokenizer.convert_tokens_to_ids("<|visual token 000000|>") == 151854


def test_the_vocabulary_has_every_token(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 184622
    assert tokenizer.get_vocab()[b"hello"] == 14990
    assert tokenizer.get_vocab()["<|visual token 032767|>"] == 184621


def test_every_visual_token_is_one_id(tokenizer):
    image = "".join(f"<|visual token {code:06d}|>" for code in range(32768))
    assert tokenizer.encode(image) == list(range(151854, 184622))
    assert tokenizer.decode(range(151854, 184622)) == image


def test_text_cannot_forge_special_tokens_unless_allowed(tokenizer):
    ids = tokenizer.encode(FORGED, allow_special=False)
    assert max(ids) < FIRST_SPECIAL
    assert tokenizer.decode(ids) == FORGED
    assert tokenizer([FORGED], allow_special=False)["input_ids"] == [ids]
    assert [i for i in tokenizer.encode(FORGED) if i >= FIRST_SPECIAL] == [151853, 151850, 151643, 151861]


def test_what_only_resembles_a_special_token_is_text(tokenizer):
    text = "<|image start <|image start|> |><|extra_205|><||><|visual token 032768|>"
    assert [i for i in tokenizer.encode(text) if i >= FIRST_SPECIAL] == [151852]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_a_small_vocabulary_has_its_special_ids_after_the_largest_rank(tmp_path):
    small = Emu3Tokenizer.from_pretrained(write_vocabulary(tmp_path, [b"he", b"ll", b"hell"]))
    assert small.encode("hello") == [258, ord("o")]
    assert small.encode("<|endoftext|>he<|image end|>") == [259, 256, 469]
    assert (small.pad_token_id, small.eod_id, small.eoi_token_id, len(small)) == (259, 259, 469, 470)
    assert small.encode("日") == list("日".encode())


# Ids to text


@pytest.mark.parametrize("form", [list, tuple, np.array, paddle.to_tensor])
def test_decode_takes_any_form_of_ids(tokenizer, form):
    assert tokenizer.decode(form([14990, 24, 151846])) == "hello9<|extra_200|>"
    rows = form([[14990, 24], [151846, 15]])
    assert tokenizer.batch_decode(rows) == ["hello9", "<|extra_200|>0"]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == ["hello9", "0"]


@pytest.mark.parametrize("form", [int, np.int64, paddle.to_tensor])
def test_decode_takes_one_id(tokenizer, form):
    assert tokenizer.decode(form(14990)) == "hello"


def test_errors_says_what_becomes_of_half_a_character(tokenizer):
    half = [162, 15]  # the first of three bytes, then "0"
    assert tokenizer.decode(half) == tokenizer.convert_tokens_to_string([b"\xe6", b"0"]) == "\ufffd0"
    assert tokenizer.decode(half, errors="ignore") == "0"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(half, errors="strict")


@pytest.mark.parametrize("bad", [184622, -1, -100, 2**70, 1.5, "a"])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, bad):
    for method in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
        with pytest.raises(InputError, match=f"^{bad!r} is not a token id: they are integers below 184622$"):
            method([14990, bad])


def test_an_unknown_token_is_named(tokenizer):
    with pytest.raises(InputError, match="'<|extra_205|>' is no token"):
        tokenizer.convert_tokens_to_ids(["<|extra_204|>", "<|extra_205|>"])


# Batches


def test_one_text_gives_flat_lists_and_several_give_nested_ones(tokenizer):
    assert tokenizer("hello") == {"input_ids": [14990], "attention_mask": [1]}
    assert tokenizer(TEXTS) == {"input_ids": ROWS, "attention_mask": [[1], [1] * 9, []]}
    assert tokenizer(TEXTS, return_attention_mask=False) == {"input_ids": ROWS}
    assert tokenizer("hello", padding="max_length", max_length=3).input_ids == [151643, 151643, 14990]


@pytest.mark.parametrize("padding", [True, "longest"])
@pytest.mark.parametrize("return_tensors", [None, "np", "pd"])
def test_padding_on_the_left_is_the_default(tokenizer, padding, return_tensors):
    batch = tokenizer(TEXTS, padding=padding, return_tensors=return_tensors)
    ids, mask = np.array(batch.input_ids), np.array(batch.attention_mask)
    assert ids.tolist() == [[151643] * 8 + ROWS[0], ROWS[1], [151643] * 9]
    assert mask.tolist() == [[0] * 8 + [1], [1] * 9, [0] * 9]


def test_padding_on_the_right(tokenizer):
    batch = tokenizer(TEXTS, padding="longest", padding_side="right", return_tensors="np")
    assert batch.input_ids.tolist() == [ROWS[0] + [151643] * 8, ROWS[1], [151643] * 9]
    assert batch.attention_mask.tolist() == [[1] + [0] * 8, [1] * 9, [0] * 9]
    assert tokenizer.padding_side == "left"


def test_tensors_are_int64_of_batch_and_length(tokenizer):
    arrays = tokenizer("hello", return_tensors="np")
    assert {(a.dtype.name, a.shape) for a in arrays.values()} == {("int64", (1, 1))}
    tensors = tokenizer(TEXTS[:2], padding=True, return_tensors="pd")
    assert {(t.dtype, tuple(t.shape)) for t in tensors.values()} == {(paddle.int64, (2, 9))}
    assert tokenizer("", return_tensors="np").input_ids.shape == (1, 0)
    assert tokenizer([], return_tensors="np").input_ids.shape == (0, 0)


def test_padding_and_truncating_to_max_length(tokenizer):
    batch = tokenizer(TEXTS, padding="max_length", max_length=4, truncation=True)
    assert batch.input_ids == [[151643] * 3 + ROWS[0], ROWS[1][:4], [151643] * 4]
    assert batch.attention_mask == [[0, 0, 0, 1], [1] * 4, [0] * 4]
    assert tokenizer(TEXTS, truncation=True, max_length=2).input_ids == [ROWS[0], ROWS[1][:2], []]
    assert len(tokenizer("hello", padding="max_length").input_ids) == 9216  # model_max_length


def test_pad_takes_rows_of_ids(tokenizer):
    rows = [[1, 2], np.array([3]), []]
    batch = tokenizer.pad(rows, padding_side="right", return_tensors="np")
    assert batch.input_ids.tolist() == [[1, 2], [3, 151643], [151643, 151643]]
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert tokenizer.pad([[1, 2], [3]], length=3).input_ids == [[151643, 1, 2], [151643, 151643, 3]]


@pytest.mark.parametrize(
    "text, options, message",
    [
        (TEXTS, {"return_tensors": "np"}, r'rows of \[1, 9, 0\] ids make no tensor: pass padding="longest"'),
        ("hello", {"return_tensors": "pt"}, "return_tensors='pt' is not accepted: .* None, 'np', 'pd'"),
        ("hello", {"padding": "do_not_pad"}, "padding='do_not_pad' is not accepted: give one of False, True"),
        ("hello", {"padding": True, "padding_side": "top"}, "padding_side='top' .* 'left', 'right'"),
        ("hello", {"truncation": True, "max_length": 0}, "positive max_length, got 0"),
        ("hello", {"max_length": 3}, "max_length does nothing without"),
        (TEXTS, {"padding": "max_length", "max_length": 4}, r"\[1, 9, 0\] ids to 4: .* truncation=True"),
        ("hello", {"padding": "max_length", "max_length": 10**30}, r"cannot pad \[1\] ids to 10"),
        (["hello", None], {}, "a text must be a str, got None"),
        (b"hello", {}, "a text must be a str, got b'hello'"),
    ],
)
def test_a_batch_that_cannot_be_made_says_why(tokenizer, text, options, message):
    with pytest.raises(InputError, match=message):
        tokenizer(text, **options)


def test_an_unknown_argument_is_a_type_error(tokenizer):
    with pytest.raises(TypeError, match="paddding"):
        tokenizer("hello", paddding=True)


# Files and copies


def test_saved_files_are_those_that_were_read(tokenizer, vocabulary_dir, tmp_path):
    files = tokenizer.save_pretrained(tmp_path / "new" / "folder")
    names = ["emu3.tiktoken", "emu3_vision_tokens.txt", "tokenizer_config.json"]
    assert [Path(file).name for file in files] == names
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == names
    for name in names[:2]:
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (vocabulary_dir / name).read_bytes()


def test_saved_config_is_what_the_original_reads(tmp_path):
    directory = write_vocabulary(tmp_path)
    config = {
        "added_tokens_decoder": {"151643": {"content": "<|endoftext|>", "special": True}},
        "auto_map": {"AutoTokenizer": ["tokenization_emu3.Emu3Tokenizer", None]},
        "eos_token": {"content": "<|extra_7|>", "lstrip": False},
        "model_max_length": 4096,
        "padding_side": "right",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Emu3Tokenizer.from_pretrained(directory, errors="ignore", eol_token="<|extra_8|>")
    tokenizer.save_pretrained(directory)
    expected = {
        "added_tokens_decoder": config["added_tokens_decoder"],
        "auto_map": config["auto_map"],
        "boi_token": "<|image start|>",
        "bos_token": "<|extra_203|>",
        "eof_token": "<|extra_201|>",
        "eoi_token": "<|image end|>",
        "eol_token": "<|extra_8|>",
        "eos_token": "<|extra_7|>",
        "errors": "ignore",
        "img_token": "<|image token|>",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "tokenizer_class": "Emu3Tokenizer",
    }
    assert (directory / "tokenizer_config.json").read_text() == json.dumps(expected, indent=2) + "\n"
    again = Emu3Tokenizer.from_pretrained(directory)
    assert (again.eos_token, again.eos_token_id, again.padding_side) == ("<|extra_7|>", 256 + 3 + 7, "right")


def test_copies_work_like_the_first(tokenizer):
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert [twin.encode(case["text"]) for case in GOLDEN] == [case["ids"] for case in GOLDEN]
        assert twin.extra == tokenizer.extra and twin.eoi_token_id == 151853


def test_threads_may_share_one(tokenizer):
    texts, ids = [case["text"] for case in GOLDEN] * 50, [case["ids"] for case in GOLDEN] * 50
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(tokenizer.encode, texts)) == ids


def test_importing_it_does_not_import_paddle():
    check = "import paddlemix.models.emu3.tokenization_emu3, sys; assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[1])


RANKS, VISION, CONFIG = "emu3.tiktoken", "emu3_vision_tokens.txt", "tokenizer_config.json"
BROKEN = [
    (RANKS, b"IQ== 0\nIg==\n", "emu3.tiktoken, line 2: expected base64 and a rank, got b'Ig=='"),
    (RANKS, b"IQ== 0\n*** 1\n", "emu3.tiktoken, line 2: expected base64 and a rank"),
    (RANKS, b"IQ== 0\n\nIg== one\n", "emu3.tiktoken, line 3: expected base64 and a rank"),
    (RANKS, b"IQ== 0\nIg== 2\n", "emu3.tiktoken, line 2: expected rank 1, got 2"),
    (RANKS, b"IQ== 0\nIg== 0\n", "emu3.tiktoken, line 2: expected rank 1, got 0"),
    (RANKS, b"IQ== 0\nIQ== 1\n", "emu3.tiktoken, line 2: the token b'!' already has rank 0"),
    (RANKS, b"IQ== 0\n", "emu3.tiktoken: no line holds the byte 0x00"),
    (RANKS, b"", "emu3.tiktoken: no line holds the byte 0x00"),
    (VISION, b"<|eye|>\nimage\n", "tokens.txt, line 2: expected a special token <|name|>, got b'im"),
    (VISION, b"<|eye|>\n<|eye|>\n", "tokens.txt, line 2: the special token <|eye|> is there already"),
    (VISION, b"<|extra_3|>\n", "tokens.txt, line 1: the special token <|extra_3|> is there already"),
    (VISION, b"<|\xff|>\n", "tokens.txt, line 1: expected a special token <|name|>, got"),
    (VISION, b"<|image token|>\n", "boi_token='<|image start|>' is not one of the tokens in emu3_vision_tokens.txt"),
    (CONFIG, b"{\n1", "tokenizer_config.json is not valid JSON"),
    (CONFIG, b"[]", "tokenizer_config.json must hold one JSON object, it holds a list"),
    (CONFIG, b'{"bos_token": null}', "bos_token=None is not one of the tokens"),
    (CONFIG, b'{"padding_side": "top"}', "padding_side='top' is not accepted"),
    (CONFIG, b"[" * 100_000, "tokenizer_config.json is not valid JSON"),
    (CONFIG, b'{"bos_token": ["a"]}', "bos_token=['a'] is not one of the tokens"),
    (CONFIG, b'{"bos_token": {"content": {}}}', "bos_token={} is not one of the tokens"),
    (CONFIG, b'{"errors": "nosuch"}', "errors='nosuch' is not what bytes.decode takes: give 'replace'"),
    (CONFIG, b'{"errors": "a\\u0000b"}', "tokenizer_config.json: errors='a\\x00b' is not what bytes.decode takes"),
    (CONFIG, b'{"errors": "\\ud800"}', "is not what bytes.decode takes"),
    (CONFIG, b'{"errors": ["replace"]}', "errors=['replace'] is not what bytes.decode takes"),
    (CONFIG, b'{"errors": "xmlcharrefreplace"}', "errors='xmlcharrefreplace' is not what bytes.decode takes"),
    (CONFIG, b'{"model_max_length": "many"}', "model_max_length must be a whole number above 0, got 'many'"),
]


@pytest.mark.parametrize("name, content, message", BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path, name, content, message):
    write_vocabulary(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        Emu3Tokenizer.from_pretrained(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to nothing"])
def test_a_config_that_is_not_a_file_is_refused(tmp_path, kind):
    path = write_vocabulary(tmp_path) / CONFIG
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "link to nothing": lambda: path.symlink_to("x")}[kind]()
    with pytest.raises(InputError, match="tokenizer_config.json is not a regular file"):
        Emu3Tokenizer.from_pretrained(tmp_path)


def test_a_config_may_have_any_key(tmp_path):
    (write_vocabulary(tmp_path) / CONFIG).write_text('{"self": 1, "cls": 2, "errors": "strict"}')
    assert Emu3Tokenizer.from_pretrained(tmp_path).extra == {"self": 1, "cls": 2}


@pytest.mark.parametrize("name", ["emu3.tiktoken", "emu3_vision_tokens.txt"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_vocabulary(tmp_path) / name).unlink()
    with pytest.raises(InputError, match=name):
        Emu3Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{name}: there is no such file"):
        Emu3Tokenizer(tmp_path / "emu3.tiktoken", tmp_path / "emu3_vision_tokens.txt")
