# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checkpoints of one or more files: weights in a model out, and back.

The files are the released ones: safetensors, one file or shards with an index. The models hold their weights in the
checkpoint's own layout, so that nothing is transposed.
"""

import contextlib
import json
import math
import re
import reprlib
import zlib
from concurrent.futures import CancelledError
from pathlib import Path

from paddlemix.machine import half_dtype, require_memory
from paddlemix.paddle_private import is_parameter, share, to_array
from paddlemix.utils import InputError, read_json, replacing

from .adapter import Adapter
from .configuration_emu3 import CONFIG_NAME, QUANTIZATIONS
from .hub import PICKLE_SUFFIXES, at_revision, fetch, local_directory, refuse_pickle
from .safetensors_file import DTYPES, SafetensorsFile, write_safetensors

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_PATTERN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def open_weights(name_or_path, part="language_model"):
    """{tensor name: SafetensorsFile that holds it} of a directory or hub name."""
    path = fetch(name_or_path, [], [SINGLE_NAME, INDEX_NAME], part)
    if (path / SINGLE_NAME).is_file():
        file = SafetensorsFile(path / SINGLE_NAME)
        return dict.fromkeys(file.shapes, file)
    if not (path / INDEX_NAME).is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            refuse_pickle(name_or_path, pickles[0])
        raise InputError(f"{str(name_or_path)!r} has neither {SINGLE_NAME} nor {INDEX_NAME}: download it again")
    weight_map = _read_index(path / INDEX_NAME)
    path = fetch(name_or_path, sorted(set(weight_map.values())), part=part)
    files = {name: SafetensorsFile(path / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name].shapes:
            raise InputError(f"{path / name} lacks {tensor}, which {INDEX_NAME} says it holds: download it again")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def weights_are_here(name_or_path, part="language_model"):
    """Whether `open_weights` finds the weights, or their index, in a directory, without asking the hub."""
    directory = local_directory(name_or_path, part)
    return any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def fingerprint(weights):
    """A number of weights, of the first row of each, that differs from another checkpoint's."""
    value = 0
    for weight in weights:
        value = zlib.crc32(weight[0].numpy().tobytes(), value)
    return value


def _read_index(path):
    try:
        weight_map = read_json(path)["weight_map"]
        names = set(weight_map.values())
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not an index of safetensors shards: download it again") from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"{path} names a shard {reprlib.repr(name)}: it must be a .safetensors file beside it")
    return weight_map


class CheckpointMixin:
    """`from_pretrained` and `save_pretrained` for a paddle.nn.Layer whose names are the checkpoint's.

    A class says in `config_class` what describes it.
    """

    config_class = None
    dtypes = ("float32", "float16", "bfloat16")
    cpu_dtypes = ("float32",)  # those of them that this layer computes with on a CPU
    checkpoint_prefix = ""  # of this layer's names in a checkpoint
    # names that a checkpoint may hold, and that are not this layer's, or are another of its weights: which one
    tied_weights = {}
    # {value of config.json: the names of what is made so many times}
    repeated = {}

    @classmethod
    def from_pretrained(
        cls, name_or_path, dtype=None, config=None, progress=True, revision=None, lora_path=None, ranks=None,
        **overrides,
    ):
        """A model with the weights of a checkpoint in the released layout, in eval mode.

        Args:
            name_or_path: a directory, a hub name (fetched into huggingface_hub's cache; HF_ENDPOINT and
                HF_HUB_OFFLINE are honoured), or "emu3-mini".
            dtype: "float32", "float16" or "bfloat16": what the weights are cast to while they are read; or, of a
                language model, "int8" or "int4": what its linear layers are quantized to, while they are read (a
                float32 embedding becomes bfloat16, the norms stay). None is float32, and for a checkpoint that is
                quantized what it holds. A CPU takes float32, and of a language model bfloat16, "int8" and "int4".
            config: a configuration in place of the checkpoint's.
            progress: show a progress bar (on a terminal).
            revision: of a hub name, a branch, a tag or a commit; "NAME@REVISION" is the same.
            lora_path: a LoRA adapter in PEFT's layout, a directory or a hub name. It is merged into the weights while
                they are read, before they are cast or quantized; beside those of a quantized checkpoint it is kept.
            ranks: parallel.TensorParallel, of a language model that several processes share: each reads its own part.
            overrides: configuration values in place of the checkpoint's.

        Raises:
            InputError (a ValueError): files missing, truncated, corrupt, or of another model; not enough memory;
                a dtype that the device cannot compute with; a model that so many processes cannot share.
        """
        return cls.open_pretrained(name_or_path, dtype, config, revision, lora_path, ranks, **overrides).read(progress)

    @classmethod
    def open_pretrained(
        cls, name_or_path, dtype=None, config=None, revision=None, lora_path=None, ranks=None, **overrides
    ):
        """What `from_pretrained` does before it reads the weights -> OpenCheckpoint. Arguments and errors as there."""
        import paddle

        name_or_path = at_revision(name_or_path, revision)
        dtype = dtype and dtype_name(dtype)
        if dtype not in (None, *cls.dtypes):
            raise InputError(f"dtype must be one of {', '.join(cls.dtypes)}, got {dtype!r}")
        if dtype not in (None, *cls.cpu_dtypes) and paddle.get_device() == "cpu":
            raise InputError(f"a CPU cannot compute with {dtype} weights: take {', '.join(cls.cpu_dtypes)}")
        for name in overrides:
            if not hasattr(cls.config_class, name):
                raise TypeError(f"{cls.__name__}.from_pretrained() got an unexpected keyword argument {name!r}")
        config = config or cls.config_class.from_pretrained(name_or_path, **overrides)
        quantized = config.quantized_dtype
        if quantized and dtype not in (None, quantized):
            raise InputError(f"{name_or_path} is {quantized}, it cannot become {dtype}: take what it was made from")
        dtype = quantized or dtype or "float32"
        adapter = None if lora_path is None else Adapter.read(lora_path)
        # The headers come first where they are here: no number of config.json makes more layers than there are weights.
        is_here = weights_are_here(name_or_path, cls.config_class.part)
        weights = _open_checked(cls, name_or_path, config) if is_here else {}
        try:
            shared = {"ranks": ranks} if ranks else {}
            with paddle.LazyGuard():  # no weight is made before the checkpoint's own takes its place
                model = cls(config, **shared)
                in_files, quantize = model._checkpoint_state(), dtype in QUANTIZATIONS and not quantized
                parts = model._parts()
                if quantize:
                    model = cls(config.quantized(dtype), **shared)
            checkpoint = OpenCheckpoint(model, weights, dtype, quantize, adapter)
            require_memory(checkpoint.size, f"in {dtype} for {name_or_path}")
            checkpoint.weights = weights = weights or _open_checked(cls, name_or_path, config)
            _check_names_and_shapes(name_or_path, in_files, weights, model.tied_weights, parts)
            if adapter:
                adapter.check(checkpoint.linear_shapes())
        except BaseException:
            _close(weights)
            raise
        return checkpoint

    def save_pretrained(self, directory, max_shard_bytes=5_000_000_000):
        """Write config.json and safetensors in the released layout, in shards where they are larger than given.

        The original's own loader and transformers-style tools read the result.

        Raises:
            InputError: the model has a LoRA adapter, which these files have no place for.
        """
        if any(name.endswith(".lora_A") for name in self.state_dict()):
            raise InputError("the model has a LoRA adapter: save_lora writes it, `emu3 merge` makes a checkpoint of it")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = self._checkpoint_state()
        shards, size = [[]], 0
        for name, tensor in state.items():
            if shards[-1] and size + _num_bytes(tensor) > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += _num_bytes(tensor)
        names = [SINGLE_NAME]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        dtype = dtype_name(next(iter(self.parameters())).dtype)
        values = {"architectures": [type(self).__name__], **self.config.to_dict(), "torch_dtype": dtype}
        config = type(self.config)(**values).to_json_string()
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        with contextlib.ExitStack() as stack:  # every file takes its place at the end, when all are whole
            _write_text(stack, directory / CONFIG_NAME, config)
            if len(shards) > 1:
                total = sum(map(_num_bytes, state.values()))
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                _write_text(stack, directory / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
            for file, shard in zip(names, shards, strict=True):
                layout = {name: (dtype_name(state[name].dtype), state[name].shape) for name in shard}
                temporary = stack.enter_context(replacing(directory / file))
                write_safetensors(temporary, layout, lambda name: to_array(state[name]))
        names += [INDEX_NAME] if len(shards) > 1 else []
        for path in directory.iterdir():  # what an earlier save left would be read in place of this one
            is_weights = path.name in (SINGLE_NAME, INDEX_NAME) or SHARD_PATTERN.fullmatch(path.name)
            if is_weights and path.name not in names:
                path.unlink()

    def _layers_of_weights(self):
        """{checkpoint name of a weight: the layer that it belongs to}"""
        return {f"{self.checkpoint_prefix}{name}.weight": layer for name, layer in self.named_sublayers()}

    def _parts(self):
        """{checkpoint name: parallel.Part} of the weights that this process does not have whole"""
        layers = [(name, layer) for name, layer in self.named_sublayers() if hasattr(layer, "parts")]
        return {
            f"{self.checkpoint_prefix}{name}.{of}": part for name, layer in layers for of, part in layer.parts().items()
        }

    def _checkpoint_state(self):
        """{checkpoint name: parameter or buffer}"""
        state = {self.checkpoint_prefix + name: tensor for name, tensor in self.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if name not in self.tied_weights}


class OpenCheckpoint:
    """A model and the files of its weights, open and checked. `read` reads them, in another thread too; `size` is how
    many bytes they take in memory, `bytes_read` how many were taken from the files.

    Args:
        model: its parameters have no memory yet.
        weights: {tensor name: SafetensorsFile}.
        dtype: of the parameters.
        quantize: into int8 or int4 while they are read.
        adapter: Adapter, or None.
    """

    def __init__(self, model, weights, dtype, quantize, adapter=None):
        self.model, self.weights, self.dtype, self.quantize, self.adapter = model, weights, dtype, quantize, adapter
        self.state, self.layers = model._checkpoint_state(), model._layers_of_weights()
        self.parts, self.bytes_read = model._parts(), 0
        self.size, self.stopped = _size(self.state, dtype) + (adapter.num_bytes if adapter else 0), False

    def read(self, progress=True):
        """The model in eval mode, with its weights. InputError: they are corrupt. CancelledError: `stop` was called."""
        from tqdm import tqdm

        weights, total = self.weights, sum(file.sizes[name] for name, file in self.weights.items())
        disable = None if progress else True  # None shows it on a terminal alone
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", leave=False, disable=disable)

        def count(size):
            if self.stopped:
                raise CancelledError
            self.bytes_read += size
            bar.update(size)

        with contextlib.closing(self), bar:
            self._merge_adapter()
            # in the order of the files, so that each is read from its start to its end
            for name in sorted(weights, key=lambda n: (str(weights[n].path), weights[n].offsets[n])):
                if name + "_scale" in self.state and self.quantize:
                    self.layers[name].quantize_from(weights[name], name, count)
                elif name in self.state:
                    _assign(self.state[name], weights[name], name, self.dtype, count, self.parts.get(name))
            self._keep_adapter()
        self.model.bytes_read = self.bytes_read
        return self.model.eval()

    def linear_shapes(self):
        """{name of a linear layer: [out, in]}"""
        layers = {name.removesuffix(".weight"): layer for name, layer in self.layers.items() if name in self.state}
        return {
            name: layer.shape for name, layer in layers.items() if hasattr(layer, "add_lora")
        }

    def _merge_adapter(self):
        """Let the adapter be added to what the files hold."""
        if self.adapter and (self.quantize or self.dtype not in QUANTIZATIONS):
            for name in self.adapter.pairs:
                self.weights[f"{name}.weight"].deltas[f"{name}.weight"] = self.adapter.delta(name)

    def _keep_adapter(self):
        """Put the adapter beside weights that are int8 or int4 in the files: rounded again, they would lose it."""
        if self.adapter and not self.quantize and self.dtype in QUANTIZATIONS:
            for name, pair in self.adapter.pairs.items():
                self.layers[f"{name}.weight"].add_lora(*pair, self.adapter.config)

    def stop(self):
        """Let `read` end, which another thread is in, after a few megabytes."""
        self.stopped = True

    def close(self):
        _close(self.weights)


def _close(weights):
    for file in set(weights.values()):
        file.close()


def _size(state, dtype):
    """Bytes of a model's tensors in memory, where those that are not quantized are of `dtype`, or of 16 bits."""
    itemsize = 4 if dtype == "float32" else 2
    return sum(
        math.prod(t.shape) * (t.element_size() if name + "_scale" in state or name.endswith("_scale") else itemsize)
        for name, t in state.items()
    )


def _num_bytes(tensor):
    return tensor.element_size() * math.prod(tensor.shape)


def dtype_name(dtype):
    """The name of a Paddle dtype, such as "float32"; a name stays what it is."""
    return str(dtype).removeprefix("paddle.")


def _write_text(stack, path, text):
    Path(stack.enter_context(replacing(path))).write_text(text, encoding="utf-8")


def _open_checked(cls, name_or_path, config):
    """`open_weights` without the buffers of old checkpoints. InputError where there are not as many layers as
    config.json asks for."""
    weights = open_weights(name_or_path, cls.config_class.part)
    weights = {name: file for name, file in weights.items() if not name.endswith(".rotary_emb.inv_freq")}
    if any(name.startswith(("text_model.", "model.text_model.", "vqmodel.", "model.vqmodel.")) for name in weights):
        raise InputError(cls.config_class.conversion(name_or_path))
    for key, pattern in cls.repeated.items():
        found = len({match[1] for match in map(re.compile(pattern).match, weights) if match})
        value = getattr(config, key)
        if found != (len(value) if isinstance(value, (list, tuple)) else value):
            raise InputError(
                f"{name_or_path} has weights of {found} where {key} {reprlib.repr(value)} of config.json asks for "
                "another number: its weights are not those of its config.json"
            )
    return weights


def _check_names_and_shapes(name_or_path, state, weights, optional, parts):
    def some(names):
        names = sorted(names)
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    if missing := state.keys() - weights.keys():
        raise InputError(f"{name_or_path} lacks {some(missing)}: its weights are not those of its config.json")
    if extra := weights.keys() - state.keys() - set(optional):
        raise InputError(f"{name_or_path} has {some(extra)} too many: its weights are not those of its config.json")
    for name, tensor in state.items():
        stored, wanted = DTYPES[weights[name].dtypes[name]], dtype_name(tensor.dtype)
        if tensor.is_floating_point() and "int" in stored:
            raise InputError(f"{weights[name].path}: tensor {name} holds integers, numbers with a fraction are needed")
        if wanted in ("int8", "uint8") and stored != wanted:
            raise InputError(
                f"{weights[name].path}: tensor {name} is {stored}, config.json's quantization_config asks for {wanted}"
            )
        expected = list(parts[name].shape if name in parts else tensor.shape)
        found = list(weights[name].shapes[name])
        if found != expected:
            raise InputError(
                f"{weights[name].path}: tensor {name} is {found}, config.json asks for {expected}: "
                "config.json or the shard is another model's"
            )
    for name, twin in optional.items():
        if twin and name in weights and not weights[name].equals(name, weights[twin], twin):
            raise InputError(
                f"{name_or_path} has {name}, which differs from {twin}, and config.json has tie_word_embeddings true: "
                "set that to false, or take the right checkpoint"
            )


def _assign(target, file, name, dtype, on_bytes, part=None):
    """Put a tensor of a file, or a Part of it, into a parameter (which has no memory yet) or a buffer (which keeps its
    dtype)."""
    import ml_dtypes  # noqa: F401  makes numpy know bfloat16
    import numpy as np
    import paddle

    if not is_parameter(target):
        array = file.read(name, dtype_name(target.dtype), on_bytes)
        target.set_value(paddle.to_tensor(array))
        return
    if dtype in QUANTIZATIONS:  # what is not quantized stays as it is, but for the one large tensor
        stored = DTYPES[file.dtypes[name]]
        is_wide = stored in ("float32", "float64") or name.endswith("_scale")  # the operators take float32 scales
        is_embedding = name.endswith("embed_tokens.weight")
        if is_embedding and stored != "float16":
            stored = half_dtype()
        dtype = "float32" if is_wide and not is_embedding else stored
    share(file.read(name, np.dtype(dtype), on_bytes, part), target)
