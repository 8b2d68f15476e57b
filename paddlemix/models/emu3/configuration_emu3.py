# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The checkpoints' config.json, nothing else.

A class attribute is the original's default; an instance holds only what was given, so that a file is
written back with the very keys it came with.
"""

import json
import reprlib
from pathlib import Path

from paddlemix.utils import InputError, read_json, write_atomically

from .hub import at_revision, fetch

CONFIG_NAME = "config.json"
GENERATION_CONFIG = "generation_config.json"
# how config.json says that the linear layers are quantized; a group is of inputs, -1 all of an output's
QUANTIZATIONS = {"int8": {"bits": 8, "group_size": -1}, "int4": {"bits": 4, "group_size": 128}}

ROLES = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")  # of the special tokens that a model has ids of
# model_type of Hugging Face transformers' own conversions, which have other names and no emu3.tiktoken
CONVERSIONS = ("emu3", "emu3_text_model", "emu3_vqgan")


class _Config:
    model_type = None
    released = ()  # hub names of the checkpoints of this kind
    part = None  # which folder of emu3-mini it is in
    files_beside = ()  # that are fetched with config.json where a checkpoint has them
    quantized_dtype = None  # "int8" or "int4" where the linear layers are

    def __init__(self, /, **values):  # a file may hold a key "self"
        model_type = values.pop("model_type", self.model_type)
        if model_type != self.model_type:
            raise InputError(
                f"the config is of a {reprlib.repr(model_type)} model, {type(self).__name__} takes "
                f"{self.model_type!r}: check that the path is that of the right checkpoint"
            )
        for name, value in values.items():
            self._check_type(name, value)
        self.__dict__.update(values)
        self._validate()
        for name in values:  # such as head_dim, which follows from others
            if isinstance(getattr(type(self), name, None), property) and values[name] != getattr(self, name):
                raise InputError(
                    f"config: {name} is {reprlib.repr(values[name])}, the other values make it {getattr(self, name)!r}"
                )

    def _check_type(self, name, value):
        """A value must be of its default's type; a key without a default can be anything."""
        default = getattr(type(self), name, None)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        accepted = {
            bool: ("true or false", isinstance(value, bool)),
            int: ("an integer", is_integer),
            float: (
                "a finite number, of float32",
                (is_integer or isinstance(value, float)) and (value == 0 or 1e-37 < abs(value) < 1e38),
            ),
            tuple: ("a list of integers", isinstance(value, (list, tuple)) and all(type(v) is int for v in value)),
        }
        words, is_accepted = accepted.get(type(default), ("called something else", not callable(default)))
        if not is_accepted:
            raise InputError(f"config: {name} must be {words}, got {reprlib.repr(value)}")

    def _validate(self):
        """Raise InputError for values that the model cannot be built from."""

    def _require(self, condition, words, *names):
        for name in names:
            value = getattr(self, name)
            if not condition(value):
                raise InputError(f"config: {name} must be {words}, got {reprlib.repr(value)}")

    def _require_positive(self, **most):
        """Names and what each is at most: far more than any model has, and little enough to work with."""
        for name, limit in most.items():
            self._require(lambda value, limit=limit: 0 < value <= limit, f"above 0 and at most {limit}", name)

    def _require_probability(self, name):
        self._require(lambda value: 0 <= value < 1, "0 or more and below 1", name)

    @classmethod
    def from_pretrained(cls, name_or_path, *, revision=None, **overrides):
        """Read config.json of a directory, a hub name or "emu3-mini". Overrides win over the file.

        revision: of a hub name, a branch, a tag or a commit; "NAME@REVISION" is the same.
        """
        name_or_path = at_revision(name_or_path, revision)
        path = fetch(name_or_path, [CONFIG_NAME], cls.files_beside, cls.part) / CONFIG_NAME
        values = read_json(path)
        if values.get("model_type") in CONVERSIONS:
            raise InputError(cls.conversion(name_or_path))
        try:
            return cls(**{**values, **overrides})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def conversion(cls, name_or_path):
        """The message on a checkpoint of transformers' own names: which one to take in its place."""
        name = str(name_or_path).rstrip("/").rsplit("/", 1)[-1].removesuffix("-hf")
        right = [one for one in cls.released if one.endswith("/" + name)] or cls.released
        return (
            f"{str(name_or_path)!r} is a conversion for Hugging Face transformers (such as Emu3-Chat-hf), which has "
            f"other names and files: take {' or '.join(right)}"
        )

    def save_pretrained(self, directory):
        """Write config.json: the keys that were given, sorted, as the released files have them."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(directory) / CONFIG_NAME, self.to_json_string())

    def to_dict(self):
        return {"model_type": self.model_type, **vars(self)}

    def to_json_string(self):
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __eq__(self, other):
        return type(other) is type(self) and other.to_dict() == self.to_dict()

    def __repr__(self):
        return f"{type(self).__name__} {self.to_json_string()}"


class Emu3Config(_Config):
    """Configuration of the language model; the defaults are the released 8-billion model's."""

    model_type = "Emu3"
    released = ("BAAI/Emu3-Gen", "BAAI/Emu3-Chat")
    part = "language_model"
    files_beside = (GENERATION_CONFIG,)

    vocab_size = 184622
    hidden_size = 4096
    intermediate_size = 14336
    num_hidden_layers = 32
    num_attention_heads = 32
    num_key_value_heads = 8
    hidden_act = "silu"
    max_position_embeddings = 9216
    initializer_range = 0.02
    rms_norm_eps = 1e-5
    use_cache = True
    pad_token_id = 151643
    bos_token_id = 151849
    eos_token_id = 151850
    img_token_id = 151851
    boi_token_id = 151852
    eoi_token_id = 151853
    eol_token_id = 151846
    eof_token_id = 151847
    image_area = 720 * 720
    tie_word_embeddings = False
    rope_theta = 1_000_000.0
    rope_scaling = None
    attention_dropout = 0.1
    quantization_config = None  # of the linear layers: one of QUANTIZATIONS

    # what PaddleNLP's `generate` asks of any configuration
    is_encoder_decoder = False
    decoder_start_token_id = None
    forced_bos_token_id = None
    forced_eos_token_id = None
    no_repeat_ngram_size = None
    tensor_parallel_degree = 1
    tensor_parallel_rank = 0

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def eos_token_ids(self):
        """The ids that end a text: a file may hold one or a list."""
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, list) else (self.eos_token_id,)

    @property
    def quantized_dtype(self):
        return next((name for name, how in QUANTIZATIONS.items() if how == self.quantization_config), None)

    def quantized(self, dtype):
        """This configuration, of a model whose linear layers are `dtype`, "int8" or "int4"."""
        return type(self)(**{**self.to_dict(), "quantization_config": QUANTIZATIONS[dtype]})

    def __init__(self, /, **values):
        if values.get("num_key_value_heads", 0) is None:  # null means that there are no groups
            values["num_key_value_heads"] = values.get("num_attention_heads", self.num_attention_heads)
        super().__init__(**_with_released_rope(values))

    def check_tokenizer(self, tokenizer):
        """InputError where an Emu3Tokenizer is not this model's: it has more tokens, or other ids for the roles."""
        if self.vocab_size < len(tokenizer):
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {self.vocab_size}: "
                "the tokenizer's files are another checkpoint's"
            )
        for name in (f"{role}_token_id" for role in ROLES):
            accepted = self.eos_token_ids if name == "eos_token_id" else (getattr(self, name),)
            if getattr(tokenizer, name) not in accepted:
                raise InputError(
                    f"config.json has {name} {getattr(self, name)}, and in the tokenizer's files it is "
                    f"{getattr(tokenizer, name)} ({getattr(tokenizer, name[:-3])}): they are of different "
                    "checkpoints, or one was edited; download them again"
                )

    def _check_type(self, name, value):
        """As others, but that several tokens may end a text."""
        several = name == "eos_token_id" and isinstance(value, list) and value
        for one in value if several else [value]:
            super()._check_type(name, one)

    def _validate(self):
        self._require_positive(
            vocab_size=2**22, hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=1000,
            num_attention_heads=2**12, num_key_value_heads=2**12, max_position_embeddings=2**27, rms_norm_eps=1,
            rope_theta=10**12, image_area=2**28,
        )  # fmt: skip
        self._require_probability("attention_dropout")
        self._require(lambda value: 0 <= value <= 100, "0 to 100", "initializer_range")
        given = [f"{role}_token_id" for role in ROLES if f"{role}_token_id" in vars(self)]
        for name in given:  # the defaults are of the released vocabulary alone
            ids = self.eos_token_ids if name == "eos_token_id" else (getattr(self, name),)
            if not all(0 <= i < self.vocab_size for i in ids):
                raise InputError(
                    f"config: {name} must be 0 to {self.vocab_size - 1}, below vocab_size, got "
                    f"{reprlib.repr(getattr(self, name))}"
                )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InputError(
                f"config: hidden_size {self.hidden_size} must be an even multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.hidden_act != "silu":
            raise InputError(f"config: hidden_act must be 'silu', got {reprlib.repr(self.hidden_act)}")
        self._validate_rope_scaling()
        if self.quantization_config is not None:
            if self.quantized_dtype is None:
                raise InputError(
                    f"config: quantization_config must be {' or '.join(map(str, QUANTIZATIONS.values()))}, "
                    f"got {reprlib.repr(self.quantization_config)}: take a checkpoint that this project quantized, "
                    "or the original"
                )
            if self.tie_word_embeddings:
                raise InputError("a model whose head is its embedding cannot be int8 or int4: take bfloat16")

    def _validate_rope_scaling(self):
        scaling = self.rope_scaling
        if scaling is None:
            return
        if self.head_dim <= 2:
            raise InputError(f"config: rope_scaling needs heads of more than 2 numbers, these have {self.head_dim}")
        factor = scaling.get("factor") if isinstance(scaling, dict) else None
        if (
            not isinstance(scaling, dict)
            or set(scaling) != {"type", "factor"}
            or scaling["type"] not in ("linear", "dynamic")
            or not isinstance(factor, float)
            or not 1.0 < factor <= 1e6
        ):
            raise InputError(
                "config: rope_scaling must be null or {'type': 'linear' or 'dynamic', 'factor': a float above 1 "
                f"and at most 1e6}}, got {reprlib.repr(scaling)}"
            )


def _with_released_rope(values):
    """Values with `rope_parameters`, and a "rope_type" in rope_scaling, of newer transformers written as the released
    files and the original have them: rope_theta and rope_scaling."""
    values, given = dict(values), values.get("rope_parameters")
    if "rope_parameters" in values:
        del values["rope_parameters"]
        if not isinstance(given, dict):
            raise InputError(f"config: rope_parameters must be an object, got {reprlib.repr(given)}")
        theta = given.get("rope_theta", values.get("rope_theta", Emu3Config.rope_theta))
        scaling = {key: value for key, value in given.items() if key != "rope_theta"} or None
        if values.get("rope_theta", theta) != theta or values.get("rope_scaling") not in (None, scaling):
            raise InputError("config: rope_parameters and rope_theta or rope_scaling contradict each other: keep one")
        values |= {"rope_theta": theta, "rope_scaling": scaling}
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_type" in scaling and "type" not in scaling:
        rope_type, others = scaling["rope_type"], {k: v for k, v in scaling.items() if k != "rope_type"}
        values["rope_scaling"] = None if rope_type == "default" and not others else {"type": rope_type, **others}
    return values


class Emu3VisionVQConfig(_Config):
    """Configuration of the vision tokenizer; the defaults are the released one's."""

    model_type = "Emu3VisionVQ"
    released = ("BAAI/Emu3-VisionTokenizer",)
    part = "vision_tokenizer"

    codebook_size = 32768
    embed_dim = 4
    z_channels = 4
    double_z = False
    in_channels = 3
    out_channels = 3
    temporal_downsample_factor = 4
    ch = 256
    ch_mult = (1, 2, 2, 4)
    num_res_blocks = 2
    attn_resolutions = (3,)
    dropout = 0.0

    @property
    def spatial_downsample_factor(self):
        return 2 ** (len(self.ch_mult) - 1)

    def _validate(self):
        self._require_positive(
            codebook_size=2**22, embed_dim=4096, z_channels=4096, in_channels=4096, out_channels=4096,
            temporal_downsample_factor=64, ch=8192, num_res_blocks=32,
        )  # fmt: skip
        self._require_probability("dropout")
        self._require(lambda ch: ch % 32 == 0, "a multiple of 32, the groups of its norms", "ch")
        self._require(
            lambda mult: 0 < len(mult) <= 8 and min(mult) > 0 and max(mult) <= 64,
            "a list of positive integers, at most 8 of at most 64",
            "ch_mult",
        )
        self._require(lambda factor: factor & (factor - 1) == 0, "a power of 2", "temporal_downsample_factor")
        self._require(lambda double: not double, "false: the quantizer has no use for it", "double_z")
        self._require(
            lambda z: z == self.embed_dim, f"embed_dim, {self.embed_dim}: the decoder joins both", "z_channels"
        )
