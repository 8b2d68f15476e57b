# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The checkpoints' config.json, nothing else.

A class attribute is the original's default; an instance holds only what was given, so that a file is
written back with the very keys it came with.
"""

import json
from pathlib import Path

from paddlemix.utils import InputError, write_atomically

from .checkpoint import fetch

CONFIG_NAME = "config.json"


class _Config:
    model_type = None

    def __init__(self, **values):
        model_type = values.pop("model_type", self.model_type)
        if model_type != self.model_type:
            raise InputError(
                f"the config is of a {model_type!r} model, {type(self).__name__} takes {self.model_type!r}: "
                "check that the path is that of the right checkpoint"
            )
        self.__dict__.update(values)
        self._validate()

    def _validate(self):
        """Raise InputError for values that the model cannot be built from."""

    def _require_positive(self, *names):
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"config: {name} must be a positive integer, got {value!r}")

    @classmethod
    def from_pretrained(cls, name_or_path, **overrides):
        """Read config.json of a directory or a hub name. Overrides win over the file."""
        path = fetch(name_or_path, [CONFIG_NAME]) / CONFIG_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON ({error}): download it again") from None
        if not isinstance(values, dict):
            raise InputError(f"{path} must hold one JSON object, it holds a {type(values).__name__}")
        return cls(**{**values, **overrides})

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

    def _validate(self):
        if self.num_key_value_heads is None:  # older files leave it out where there are no groups
            self.num_key_value_heads = self.num_attention_heads
        self._require_positive(
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings",
        )  # fmt: skip
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

    def _validate_rope_scaling(self):
        scaling = self.rope_scaling
        if scaling is None:
            return
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
        if self.double_z:
            raise InputError("config: double_z must be false, the released quantizer has no use for it")
        if self.ch % 32:
            raise InputError(f"config: ch must be a multiple of 32, the groups of its norms, got {self.ch}")
        if self.temporal_downsample_factor & (self.temporal_downsample_factor - 1):
            raise InputError(
                f"config: temporal_downsample_factor must be a power of 2, got {self.temporal_downsample_factor}"
            )
