# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A LoRA adapter as files, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

LoRA (Hu et al., arXiv 2106.09685): a linear layer gives W x + scale B A x, where A is [rank, in] and B [out, rank].
"""

import json
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddlemix.utils import InputError, read_json, real_number, replacing, shown, whole_number

from .hub import ADAPTER_CONFIG, PICKLE_SUFFIXES, fetch, local_directory, refuse_pickle
from .safetensors_file import DTYPES, SafetensorsFile, write_safetensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, of each name
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"  # which PEFT's "all-linear" leaves out

# Fields of PEFT's LoraConfig that are read, that say how the adapter was trained, or which layers have one, which the
# weights' names say as well. Any other that is set would change what is computed.
READ = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "task_type",
)  # fmt: skip
FIXED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


@dataclass(frozen=True)
class LoraConfig:
    """Which layers have an adapter, and of what form. InputError for values that cannot be.

    Args:
        rank: of the product B A.
        alpha: B A is multiplied by alpha / rank, or alpha / sqrt(rank) where `rank_stabilized` (arXiv 2312.03732).
        dropout: of what A takes, in training.
        target_modules: ends of names of linear layers, a list; or a regular expression of whole names; or "all-linear",
            which is all but the head.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: tuple | str = PROJECTIONS
    rank_stabilized: bool = False

    def __post_init__(self):
        targets = self.target_modules
        if isinstance(targets, (list, set, tuple)) and all(isinstance(name, str) for name in targets):
            targets = tuple(dict.fromkeys(targets))
        is_pattern = isinstance(targets, str) and _compiles(targets)
        if not targets or not (is_pattern or isinstance(targets, tuple)):
            raise InputError(
                f"target_modules must be names of linear layers such as q_proj, a regular expression or 'all-linear', "
                f"got {shown(self.target_modules)}"
            )
        if not isinstance(self.rank_stabilized, bool):
            raise InputError(f"rank_stabilized must be true or false, got {shown(self.rank_stabilized)}")
        values = {
            "rank": whole_number("the rank of LoRA", self.rank, "1 to 65536, a whole number", 1, 65536),
            "alpha": real_number("the alpha of LoRA", self.alpha, "above 0, at most 1e6", 1e-6, 1e6),
            "dropout": real_number("the dropout of LoRA", self.dropout, "0 or more and below 1", 0, 1 - 1e-6),
            "target_modules": targets,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def scale(self):
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def chosen(self, names, all_found=True):
        """Those of the names of a model's linear layers that have an adapter, as PEFT chooses them.

        InputError: one of target_modules is of none of them, where all are to be found.
        """
        targets = self.target_modules
        if targets == "all-linear":
            return [name for name in names if name != HEAD]
        is_pattern, found = isinstance(targets, str), set()
        for target in [targets] if is_pattern else targets:
            of_it = {n for n in names if (re.fullmatch(target, n) if is_pattern else f".{n}".endswith(f".{target}"))}
            if all_found and not of_it:
                kinds = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
                raise InputError(f"target_modules: no linear layer is called {shown(target)}, there are {kinds}")
            found |= of_it
        return [name for name in names if name in found]

    def to_peft(self, base_model):
        """What adapter_config.json holds."""
        targets = self.target_modules
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model and str(base_model),
            "r": self.rank, "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout, "target_modules": targets if isinstance(targets, str) else list(targets),
            "use_rslora": self.rank_stabilized, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
            "inference_mode": True, "modules_to_save": None,
        }  # fmt: skip

    @classmethod
    def from_pretrained(cls, name_or_path):
        """Read adapter_config.json of a directory or a hub name. InputError: there is none, it is not of LoRA, or one
        of its fields would change what is computed."""
        path = _directory(name_or_path) / ADAPTER_CONFIG
        values = read_json(path)
        if "peft_type" not in values:
            raise InputError(f"{path} has no peft_type: it is not the configuration of an adapter")
        for name, accepted in FIXED.items():
            if name in values and values[name] not in accepted:
                raise InputError(
                    f"{path}: {name} {shown(values[name])} is not supported, {' or '.join(map(repr, accepted))} is"
                )
        for name, value in values.items():
            if value and name not in (*READ, *HARMLESS, *FIXED):
                raise InputError(
                    f"{path}: {name} {shown(value)} is not supported: merge this adapter with PEFT and take the whole "
                    "checkpoint"
                )
        given = {
            "rank": values.get("r", 8), "alpha": values.get("lora_alpha", 8), "dropout": values.get("lora_dropout", 0),
            "target_modules": values.get("target_modules"), "rank_stabilized": values.get("use_rslora", False),
        }  # fmt: skip
        try:
            return cls(**given)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def _compiles(pattern):
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


class Adapter:
    """The weights of a LoRA adapter.

    Args:
        config: LoraConfig.
        pairs: {name of a linear layer: (A [rank, in], B [out, rank])}, float32 arrays.
        path: where they come from, for errors.
    """

    def __init__(self, config, pairs, path=None):
        self.config, self.pairs, self.path = config, pairs, path

    @property
    def num_bytes(self):
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())

    @classmethod
    def read(cls, name_or_path):
        """The adapter of a directory or a hub name. InputError: there is none, or it holds what is not supported."""
        config, path = LoraConfig.from_pretrained(name_or_path), _directory(name_or_path) / ADAPTER_WEIGHTS
        file, arrays = SafetensorsFile(path), {}
        try:
            for name in sorted(file.shapes):
                if name.endswith(".base_layer.weight"):  # PEFT's copy of the head's own weight
                    continue
                match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", name)
                if not match or len(file.shapes[name]) != 2 or "int" in DTYPES[file.dtypes[name]]:
                    raise InputError(
                        f"{path}: tensor {name} is not supported: LoRA of linear layers has matrices of floats, "
                        f"{PREFIX}LAYER.lora_A.weight and lora_B.weight"
                    )
                arrays.setdefault(match[1], {})[match[2]] = file.read(name, np.dtype("float32"))
        finally:
            file.close()
        if not arrays:
            raise InputError(f"{path} holds no weights")
        for name, pair in arrays.items():
            shapes = {part: array.shape for part, array in pair.items()}
            if len(pair) < 2 or not shapes["A"][0] == shapes["B"][1] == config.rank:
                found = ", ".join(f"lora_{part} {list(shape)}" for part, shape in sorted(shapes.items()))
                raise InputError(
                    f"{path}: {name} has {found}, and by {ADAPTER_CONFIG} needs lora_A [{config.rank}, in] and "
                    f"lora_B [out, {config.rank}]"
                )
        return cls(config, {name: (pair["A"], pair["B"]) for name, pair in arrays.items()}, path)

    def check(self, shapes):
        """InputError where it is another model's, or PEFT would leave some of it out.

        shapes: {name of a linear layer: [out, in]} of the model.
        """
        for name, (a, b) in self.pairs.items():
            if name not in shapes:
                raise InputError(
                    f"{self.path} has weights for {name}, which is no linear layer of this model: "
                    "the adapter is of another model"
                )
            if list(shapes[name]) != [len(b), a.shape[1]]:
                raise InputError(
                    f"{self.path}: the weights for {name} make [{len(b)}, {a.shape[1]}], the model has "
                    f"{list(shapes[name])}: the adapter is of another model"
                )
        left_out = sorted(self.pairs.keys() - self.config.chosen(shapes, all_found=False))
        if left_out:
            raise InputError(
                f"{self.path} has weights for {left_out[0]}, which target_modules in {ADAPTER_CONFIG} leaves out: name "
                "all layers there that the adapter is of"
            )

    def write(self, directory, base_model=None):
        """Write both files, each whole or not at all. base_model: the name that PEFT loads the model by, or None."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for name, pair in self.pairs.items():
            arrays |= {f"{PREFIX}{name}.lora_{part}.weight": array for part, array in zip("AB", pair, strict=True)}
        layout = {name: ("float32", array.shape) for name, array in arrays.items()}
        with ExitStack() as stack:  # both take their places at the end, when both are whole
            path = Path(stack.enter_context(replacing(directory / ADAPTER_CONFIG)))
            path.write_text(json.dumps(self.config.to_peft(base_model), indent=2, sort_keys=True) + "\n", "utf-8")
            write_safetensors(stack.enter_context(replacing(directory / ADAPTER_WEIGHTS)), layout, arrays.get)

    def delta(self, name):
        """The Delta of a linear layer; None where it has none."""
        return Delta(*self.pairs[name], np.float32(self.config.scale)) if name in self.pairs else None


@dataclass(frozen=True)
class Delta:
    """scale B A, which is added to a weight some rows at a time."""

    a: object
    b: object
    scale: object

    def added_to(self, chunk, first):
        """The numbers of whole rows of a weight from the number `first` on, in float32 and with the delta's added."""
        columns = self.a.shape[1]
        rows = self.b[first // columns : (first + chunk.size) // columns]
        return chunk.astype(np.float32) + (rows @ self.a * self.scale).reshape(-1)


def _directory(name_or_path):
    """Where an adapter's files are; of a hub name they are fetched."""
    path, wanted = local_directory(name_or_path), "give the folder that `emu3 train` or PEFT wrote, or a hub name"
    if not path.exists() and str(name_or_path).count("/") == 1:
        return fetch(name_or_path, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    if not str(name_or_path).strip() or not path.exists():
        raise InputError(f"no LoRA adapter at {str(name_or_path)!r}: {wanted}")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            pickles = sorted(p.name for p in path.glob("adapter_model.*") if p.suffix in PICKLE_SUFFIXES)
            if pickles:
                refuse_pickle(name_or_path, pickles[0])
            raise InputError(f"{str(name_or_path)!r} has no {name}: it is not a LoRA adapter; {wanted}")
    return path
