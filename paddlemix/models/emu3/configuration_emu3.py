# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The checkpoints' config.json, nothing else.

A class attribute is the original's default; an instance holds only what was given, so that a file is
written back with the very keys it came with.
"""

import json
import math
from pathlib import Path

from paddlemix.utils import InputError, write_atomically

from .hub import at_revision, fetch

CONFIG_NAME = "config.json"
GENERATION_CONFIG = "generation_config.json"
# how config.json says that the linear layers are quantized; a group is of inputs, -1 all of an output's
QUANTIZATIONS = {"int8": {"bits": 8, "group_size": -1}, "int4": {"bits": 4, "group_size": 128}}


class _Config:
    model_type = None
    part = None  # which folder of emu3-mini it is in
    files_beside = ()  # that are fetched with config.json where a checkpoint has them
    quantized_dtype = None  # "int8" or "int4" where the linear layers are

    def __init__(self, **values):
        model_type = values.pop("model_type", self.model_type)
        if model_type != self.model_type:
            raise InputError(
                f"the config is of a {model_type!r} model, {type(self).__name__} takes {self.model_type!r}: "
                "check that the path is that of the right checkpoint"
            )
        for name, value in values.items():
            self._check_type(name, value)
        self.__dict__.update(values)
        self._validate()

    def _check_type(self, name, value):
        """A value must be of its default's type; a key without a default can be anything."""
        default = getattr(type(self), name, None)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        accepted = {
            bool: ("true or false", isinstance(value, bool)),
            int: ("an integer", is_integer),
            float: ("a finite number", (is_integer or isinstance(value, float)) and math.isfinite(value)),
            tuple: ("a list of integers", isinstance(value, (list, tuple)) and all(type(v) is int for v in value)),
        }
        words, is_accepted = accepted.get(type(default), ("called something else", not callable(default)))
        if not is_accepted:
            raise InputError(f"config: {name} must be {words}, got {value!r}")

    def _validate(self):
        """Raise InputError for values that the model cannot be built from."""

    def _require(self, condition, words, *names):
        for name in names:
            value = getattr(self, name)
            if not condition(value):
                raise InputError(f"config: {name} must be {words}, got {value!r}")

    def _require_positive(self, *names):
        self._require(lambda value: 0 < value < 2**31, "above 0 and below 2**31", *names)

    def _require_probability(self, name):
        self._require(lambda value: 0 <= value < 1, "0 or more and below 1", name)

    @classmethod
    def from_pretrained(cls, name_or_path, *, revision=None, **overrides):
        """Read config.json of a directory, a hub name or "emu3-mini". Overrides win over the file.

        revision: of a hub name, a branch, a tag or a commit; "NAME@REVISION" is the same.
        """
        name_or_path = at_revision(name_or_path, revision)
        path = fetch(name_or_path, [CONFIG_NAME], cls.files_beside, cls.part) / CONFIG_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not valid JSON ({error}): download it again") from None
        if not isinstance(values, dict):
            raise InputError(f"{path} must hold one JSON object, it holds a {type(values).__name__}")
        try:
            return cls(**{**values, **overrides})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

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
    def quantized_dtype(self):
        return next((name for name, how in QUANTIZATIONS.items() if how == self.quantization_config), None)

    def quantized(self, dtype):
        """This configuration, of a model whose linear layers are `dtype`, "int8" or "int4"."""
        return type(self)(**{**self.to_dict(), "quantization_config": QUANTIZATIONS[dtype]})

    def __init__(self, **values):
        if values.get("num_key_value_heads", 0) is None:  # null means that there are no groups
            values["num_key_value_heads"] = values.get("num_attention_heads", self.num_attention_heads)
        super().__init__(**values)

    def _validate(self):
        self._require_positive(
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "image_area",
        )  # fmt: skip
        self._require_probability("attention_dropout")
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
            raise InputError(f"config: hidden_act must be 'silu', got {self.hidden_act!r}")
        self._validate_rope_scaling()
        if self.quantization_config is not None:
            if self.quantized_dtype is None:
                raise InputError(
                    f"config: quantization_config must be {' or '.join(map(str, QUANTIZATIONS.values()))}, "
                    f"got {self.quantization_config!r}: take a checkpoint that this project quantized, or the original"
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
            or not 1.0 < factor < float("inf")
        ):
            raise InputError(
                "config: rope_scaling must be null or {'type': 'linear' or 'dynamic', 'factor': a float above 1}, "
                f"got {scaling!r}"
            )


class Emu3VisionVQConfig(_Config):
    """Configuration of the vision tokenizer; the defaults are the released one's."""

    model_type = "Emu3VisionVQ"
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
            "codebook_size", "embed_dim", "z_channels", "in_channels", "out_channels",
            "temporal_downsample_factor", "ch", "num_res_blocks",
        )  # fmt: skip
        self._require_probability("dropout")
        self._require(lambda ch: ch % 32 == 0, "a multiple of 32, the groups of its norms", "ch")
        self._require(lambda mult: mult and min(mult) > 0, "a list of positive integers", "ch_mult")
        self._require(lambda factor: factor & (factor - 1) == 0, "a power of 2", "temporal_downsample_factor")
        self._require(lambda double: not double, "false: the quantizer has no use for it", "double_z")
        self._require(
            lambda z: z == self.embed_dim, f"embed_dim, {self.embed_dim}: the decoder joins both", "z_channels"
        )
