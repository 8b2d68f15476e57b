# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Text <-> token ids: Qwen's byte-level BPE, then 208 special tokens for text, then those for pictures.

An ordinary token is `bytes` (it may hold part of a character), a special token is `str`.
"""

import base64
import functools
import json
import os
import re
import reprlib
import unicodedata
from numbers import Integral
from pathlib import Path

import tiktoken

from paddlemix.utils import (
    BatchFeature,
    InputError,
    pad_rows,
    read_bytes,
    read_json,
    shown,
    whole_numbers,
    write_atomically,
)

from .hub import at_revision, fetch

VOCAB_FILE = "emu3.tiktoken"
SPECIAL_TOKENS_FILE = "emu3_vision_tokens.txt"
CONFIG_FILE = "tokenizer_config.json"
UNLIMITED = 10**9  # transformers writes model_max_length 10**30 for "no limit"

# The pieces that BPE never merges across; the first alternative that matches wins.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
    r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the space or sign before it
    r"\p{N}",  # digits, one by one
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line ends after it
    r"\s*[\r\n]+",  # line ends, with the space before them
    r"\s+(?!\S)",  # space, but for the last one before a word
    r"\s+",
)
TEXT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
MOST_MARKS = 256  # combining marks in a row: NFC takes their number squared; Unicode's own limit (UAX #15) is 30
MARKS_OF_TWO = "\u0f73\u0f75\u0f81"  # they are marks once they are decomposed
SPECIAL_FORM = re.compile(r"<\|[^<>|]+\|>")  # two of these never overlap, so findall misses none


def files_beside(name_or_path):
    """The paths of a language model's files beside its weights and config.json, those that there are."""
    required, optional = [VOCAB_FILE, SPECIAL_TOKENS_FILE], [CONFIG_FILE, "generation_config.json"]
    folder = fetch(name_or_path, required, optional)
    return [folder / name for name in required + optional if (folder / name).is_file()]


def _one_of(name, value, accepted):
    if value not in accepted:
        raise InputError(f"{name}={reprlib.repr(value)} is not accepted: give one of {', '.join(map(repr, accepted))}")


def _check_error_handler(errors):
    try:
        b"\xff".decode("utf-8", errors)
    except UnicodeDecodeError:  # "strict"
        pass
    except (LookupError, TypeError, ValueError):  # unknown, of another type, with a character that names cannot have
        raise InputError(
            f"errors={reprlib.repr(errors)} is not what bytes.decode takes: give 'replace', 'ignore' or 'strict'"
        ) from None


def normalized(text):
    """The text in NFC. InputError where it would take long."""
    if not text.isascii() and len(text) > MOST_MARKS:
        is_mark = bytes(unicodedata.combining(c) > 0 or c in MARKS_OF_TWO for c in text)
        if bytes([1]) * (MOST_MARKS + 1) in is_mark:
            raise InputError(f"a text has more than {MOST_MARKS} combining marks (accents) in a row: shorten it")
    return unicodedata.normalize("NFC", text)


class _Broken(Exception):
    """A file of the vocabulary cannot be read: its place in `_vocabulary`'s arguments, and what follows its path."""


@functools.lru_cache(maxsize=2)
def _vocabulary(ranks_file, specials_file):
    """(id of each token, tokens by id, the first special id, tiktoken's encoding), of the bytes of the two files.

    Models with the same files share them: to make them takes most of a second.
    """
    ranks, specials = _read_ranks(ranks_file), _read_specials(specials_file)
    specials = {token: i for i, token in enumerate(specials, len(ranks))}
    encoding = tiktoken.Encoding("emu3", pat_str="|".join(PIECES), mergeable_ranks=ranks, special_tokens=specials)
    ids = {**ranks, **specials}
    return ids, list(ids), len(ranks), encoding


def _lines(data):
    """(number, bytes) of each line that is not blank."""
    return ((number, line) for number, line in enumerate(data.splitlines(), start=1) if line.strip())


def _read_ranks(data):
    """The ordinary tokens and their ranks, which start at 0 and have no gaps: dict of bytes to int."""
    ranks = {}
    for number, line in _lines(data):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise _Broken(0, f", line {number}: expected base64 and a rank, got {reprlib.repr(line)}") from None
        if rank != len(ranks):
            raise _Broken(0, f", line {number}: expected rank {len(ranks)}, got {rank}: ranks count up, a line each")
        if token in ranks:
            raise _Broken(0, f", line {number}: the token {token!r} already has rank {ranks[token]}")
        ranks[token] = rank
    for byte in range(256):  # BPE starts from single bytes: tiktoken panics at one that is not a token
        if bytes([byte]) not in ranks:
            raise _Broken(0, f": no line holds the byte {byte:#04x}, each of the 256 must be a token")
    return ranks


def _read_specials(data):
    """All special tokens in the order of their ids: list of str."""
    tokens = dict.fromkeys(TEXT_SPECIALS)
    for number, line in _lines(data):
        token = line.decode("utf-8", errors="replace").strip()
        if not SPECIAL_FORM.fullmatch(token) or "\ufffd" in token:
            raise _Broken(1, f", line {number}: expected a special token <|name|>, got {reprlib.repr(line)}")
        if token in tokens:
            raise _Broken(1, f", line {number}: the special token {token} is there already")
        tokens[token] = None
    return list(tokens)


def _is_whole(value):
    return isinstance(value, Integral) and not isinstance(value, bool)


def _role(name):
    """Two read-only properties: the token in this role, and its id."""
    return property(lambda self: self._roles[name]), property(lambda self: self._ids[self._roles[name]])


class Emu3Tokenizer:
    """Emu3's tokenizer; threads may share one. `from_pretrained` reads it from a checkpoint.

    `vocab_file` is emu3.tiktoken, `special_tokens_file` emu3_vision_tokens.txt; special ids start after the
    largest rank. `extra` is what else tokenizer_config.json says, kept to be written back.
    A broken or missing file raises InputError (a ValueError) that names the file and the line.
    """

    bos_token, bos_token_id = _role("bos_token")
    eos_token, eos_token_id = _role("eos_token")
    pad_token, pad_token_id = _role("pad_token")
    img_token, img_token_id = _role("img_token")
    boi_token, boi_token_id = _role("boi_token")
    eoi_token, eoi_token_id = _role("eoi_token")
    eol_token, eol_token_id = _role("eol_token")
    eof_token, eof_token_id = _role("eof_token")
    vocab_size = property(lambda self: len(self._tokens))

    def __init__(
        self,
        /,
        vocab_file,
        special_tokens_file,
        errors="replace",
        padding_side="left",
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        pad_token="<|endoftext|>",
        img_token="<|image token|>",
        boi_token="<|image start|>",
        eoi_token="<|image end|>",
        eol_token="<|extra_200|>",
        eof_token="<|extra_201|>",
        model_max_length=None,
        **extra,
    ):
        _one_of("padding_side", padding_side, ("left", "right"))
        _check_error_handler(errors)
        if model_max_length is not None and not (type(model_max_length) is int and model_max_length > 0):
            raise InputError(f"model_max_length must be a whole number above 0, got {reprlib.repr(model_max_length)}")
        self.errors, self.padding_side = errors, padding_side
        self.model_max_length, self.extra = model_max_length, extra

        paths = Path(vocab_file), Path(special_tokens_file)
        try:
            self._ids, self._tokens, self.eod_id, self._encoding = _vocabulary(*map(read_bytes, paths))
        except _Broken as broken:
            which, words = broken.args
            raise InputError(f"{paths[which]}{words}") from None
        roles = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        roles |= {"img_token": img_token, "boi_token": boi_token, "eoi_token": eoi_token}
        roles |= {"eol_token": eol_token, "eof_token": eof_token}
        self._roles = {name: t.get("content") if isinstance(t, dict) else t for name, t in roles.items()}
        for name, token in self._roles.items():
            if not isinstance(token, str) or self._ids.get(token, -1) < self.eod_id:
                raise InputError(f"{name}={reprlib.repr(token)} is not one of the tokens in {SPECIAL_TOKENS_FILE}")

    @classmethod
    def from_pretrained(cls, name_or_dir, *, revision=None, **overrides):
        """Read the tokenizer of a directory, a hub name or "emu3-mini". Overrides win over tokenizer_config.json.

        revision: of a hub name, a branch, a tag or a commit; "NAME@REVISION" is the same.
        """
        name_or_dir = at_revision(name_or_dir, revision)
        directory = fetch(name_or_dir, [VOCAB_FILE, SPECIAL_TOKENS_FILE], [CONFIG_FILE])
        config = read_json(directory / CONFIG_FILE) if os.path.lexists(directory / CONFIG_FILE) else {}
        config.update(vocab_file=directory / VOCAB_FILE, special_tokens_file=directory / SPECIAL_TOKENS_FILE)
        try:
            return cls(**{**config, **overrides})
        except InputError as error:
            if str(directory) in str(error):  # it names another file
                raise
            raise InputError(f"{directory / CONFIG_FILE}: {error}") from None

    def save_vocabulary(self, directory):
        """Write emu3.tiktoken and emu3_vision_tokens.txt; returns their two paths as str."""
        paths = Path(directory) / VOCAB_FILE, Path(directory) / SPECIAL_TOKENS_FILE
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        ordinary = [base64.b64encode(token).decode() for token in self._tokens[: self.eod_id]]
        vision = self._tokens[self.eod_id + len(TEXT_SPECIALS) :]
        write_atomically(paths[0], "".join(f"{token} {rank}\n" for rank, token in enumerate(ordinary)))
        write_atomically(paths[1], "".join(f"{token}\n" for token in vision))
        return tuple(map(str, paths))

    def save_pretrained(self, directory):
        """Write both vocabulary files and tokenizer_config.json; returns their three paths as str."""
        config = {"tokenizer_class": "Emu3Tokenizer", **self.extra, **self._roles}
        config.update(errors=self.errors, padding_side=self.padding_side)
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        path = Path(directory) / CONFIG_FILE
        paths = self.save_vocabulary(directory)
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        return *paths, str(path)

    def __len__(self):
        return len(self._tokens)

    def get_vocab(self):
        """A new dict of every token (bytes, or str if special) to its id."""
        return dict(self._ids)

    def convert_tokens_to_ids(self, tokens):
        """The id of one token, a list for several. A str is a special token or an ordinary one's text."""
        if not isinstance(tokens, (str, bytes)):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        for form in (tokens, tokens.encode() if isinstance(tokens, str) else tokens):
            if form in self._ids:
                return self._ids[form]
        raise InputError(f"{tokens!r} is not a token of this vocabulary")

    def convert_ids_to_tokens(self, ids):
        """The token (bytes, or str if special) of one id, a list for several."""
        tokens = [self._tokens[i] for i in self._checked(ids)]
        return tokens[0] if isinstance(ids, Integral) or getattr(ids, "ndim", 1) == 0 else tokens

    def convert_tokens_to_string(self, tokens):
        """The text of a list of tokens, equal to what `decode` gives for their ids."""
        return b"".join(t.encode() if isinstance(t, str) else t for t in tokens).decode("utf-8", self.errors)

    def encode(self, text, allow_special=True):
        """The ids of a text: list[int]. Without `allow_special`, a special token in it is plain text."""
        if not isinstance(text, str):
            raise InputError(f"a text must be a str, got {reprlib.repr(text)}")
        text = normalized(text)
        # only those that occur: tiktoken copies the set at each call, 15 ms for all 32,979
        special = {t for t in SPECIAL_FORM.findall(text) if t in self._ids} if allow_special else set()
        try:
            return self._encoding.encode(text, allowed_special=special, disallowed_special=())
        except ValueError:  # tiktoken's regular expression has its stack for so many
            raise InputError("a text has too many spaces in a row, nearly a million: shorten them") from None

    def tokenize(self, text, allow_special=True):
        """The tokens of a text: list of bytes and, for special ones, str."""
        return self.convert_ids_to_tokens(self.encode(text, allow_special))

    def decode(self, ids, skip_special_tokens=False, errors=None):
        """The text of an id or of a row of ids: int, list, numpy array or paddle tensor [length].

        `errors` says what becomes of bytes that are not UTF-8, as in `bytes.decode`; default `self.errors`.
        """
        ids = [i for i in self._checked(ids) if not skip_special_tokens or i < self.eod_id]
        return self._encoding.decode(ids, errors=errors or self.errors)

    def batch_decode(self, rows, skip_special_tokens=False, errors=None):
        """The texts of several rows: a list of lists, an array or a tensor [batch, length]."""
        return [self.decode(row, skip_special_tokens, errors) for row in rows]

    def _checked(self, ids):
        """A list of int from any form of a row of ids; InputError where one is not in the vocabulary."""
        ids = whole_numbers("ids", ids).tolist() if hasattr(ids, "dtype") else ids
        ids = list(ids) if hasattr(ids, "__iter__") else [ids]
        for i in ids:
            if not (_is_whole(i) and 0 <= i < len(self)):
                raise InputError(f"{shown(i)} is not a token id: they are integers below {len(self)}")
        return ids

    def __call__(
        self,
        text,
        padding=False,
        padding_side=None,
        max_length=None,
        truncation=False,
        return_tensors=None,
        return_attention_mask=True,
        allow_special=True,
    ):
        """input_ids and attention_mask (1 text, 0 padding) of a text or a list of texts: BatchFeature.

        `return_tensors` "np" or "pd" gives int64 [batch, length], None gives lists, a flat one for one text.
        `padding` is True or "longest", to the longest row, or "max_length"; `truncation` keeps the first
        `max_length` ids of a row. `max_length` is `model_max_length` unless given.
        """
        _one_of("padding", padding, (False, True, "longest", "max_length"))
        texts = text if isinstance(text, (list, tuple)) else [text]
        rows = [self.encode(one, allow_special) for one in texts]
        to_limit = padding == "max_length"
        limit = self.model_max_length if max_length is None else max_length
        if (truncation or to_limit) and not (_is_whole(limit) and limit > 0):
            raise InputError(f"truncation and padding to a length need a positive max_length, got {limit!r}")
        if max_length is not None and not (truncation or to_limit):
            raise InputError('max_length does nothing without truncation=True or padding="max_length"')
        rows = [row[:limit] for row in rows] if truncation else rows
        lengths = [len(row) for row in rows]
        if to_limit and not max(lengths, default=0) <= limit < UNLIMITED:
            raise InputError(f"cannot pad {lengths[:8]} ids to {limit}: give max_length or truncation=True")
        if return_tensors and not padding and len(set(lengths)) > 1:
            raise InputError(f'rows of {lengths[:8]} ids make no tensor: pass padding="longest"')

        if padding or return_tensors:
            batch = self.pad(rows, padding_side, limit if to_limit else 0, return_tensors)
        else:
            batch = BatchFeature(input_ids=rows, attention_mask=[[1] * length for length in lengths])
        if not return_attention_mask:
            del batch["attention_mask"]
        if texts is not text and not return_tensors:
            batch = BatchFeature((name, only) for name, [only] in batch.items())
        return batch

    def pad(self, rows, padding_side=None, length=0, return_tensors=None):
        """Rows of ids padded to the longest, or to `length` if that is more: input_ids and attention_mask.

        Both int64 [batch, length] for `return_tensors` "np" or "pd", lists for None.
        """
        side = self.padding_side if padding_side is None else padding_side
        _one_of("padding_side", side, ("left", "right"))
        _one_of("return_tensors", return_tensors, (None, "np", "pd"))
        input_ids, attention_mask = pad_rows(rows, self.pad_token_id, side, length)
        if return_tensors == "pd":
            import paddle

            input_ids, attention_mask = paddle.to_tensor(input_ids), paddle.to_tensor(attention_mask)
        elif return_tensors is None:
            input_ids, attention_mask = input_ids.tolist(), attention_mask.tolist()
        return BatchFeature(input_ids=input_ids, attention_mask=attention_mask)
