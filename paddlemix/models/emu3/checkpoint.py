# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checkpoints: a directory or a hub name in, weights in a model out, and back.

The files are the released ones: safetensors, one file or shards with an index. The models hold their weights in
the checkpoint's own layout, so that nothing is transposed. The files are read through a memory map, a few
megabytes at a time, and the pages read are handed back to the system at once, so that loading takes little more
memory than the loaded model.
"""

import contextlib
import json
import math
import mmap
import re
from pathlib import Path

from paddlemix.utils import InputError, replacing

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_PATTERN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pdparams")
# safetensors' names of the number types that a checkpoint may hold -> numpy's and ml_dtypes' names
DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "I8": "int8",
    "U8": "uint8",
}  # fmt: skip
# how config.json tells that the linear layers are quantized; a group is of inputs, -1 all of an output's
QUANTIZATIONS = {"int8": {"bits": 8, "group_size": -1}, "int4": {"bits": 4, "group_size": 128}}
RELEASE_BYTES = 64 << 20  # pages read are handed back to the system after so many bytes
AHEAD_BYTES = 64 << 20  # what the system is asked for before it is read: by itself it fetches small pieces of a map
CHUNK_BYTES = 8 << 20
HUB_TIMEOUT = 15  # seconds that the hub may be silent
MINI = "emu3-mini"  # this name is always the small checkpoint that comes with the package; a folder is ./emu3-mini
MINI_DIRECTORY = Path(__file__).resolve().parents[2] / "demo_models" / "emu3_mini"


# --- where the files are ---------------------------------------------------------------------------------


def fetch(name_or_path, required, optional=(), part="language_model"):
    """The directory that holds a checkpoint's files, fetched from the hub where the name is no directory.

    Args:
        name_or_path: a directory, a hub name such as "BAAI/Emu3-Gen", or "emu3-mini", which is always the checkpoint
            that comes with the package, whatever the working folder holds.
        required, optional: file names. Of a hub checkpoint these and no others are fetched.
        part: of emu3-mini, "language_model" or "vision_tokenizer".

    Raises:
        InputError: there is no such directory or checkpoint, a required file is missing in it, or it is
            neither cached nor within reach.
    """
    if not str(name_or_path or "").strip():
        raise InputError("the path of the checkpoint is empty: give a directory or a hub name such as BAAI/Emu3-Gen")
    path = MINI_DIRECTORY / part if name_or_path == MINI else Path(name_or_path).expanduser()
    if path.suffix in PICKLE_SUFFIXES and path.is_file():
        _refuse_pickle(name_or_path, path.name)
    if not path.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name_or_path)) or path.exists():
            raise InputError(
                f"no checkpoint at {str(name_or_path)!r}: give a directory that exists, "
                "a hub name such as BAAI/Emu3-Gen, or emu3-mini"
            )
        path = _fetch_from_hub(str(name_or_path), required, optional)
    for name in required:
        if not (path / name).is_file():
            raise InputError(
                f"{str(name_or_path)!r} has no {name}: it is not a whole Emu3 checkpoint, or not the one for this; "
                "check the path or download it again"
            )
    return path


def matching_vision_tokenizer(name_or_path):
    """The vision tokenizer that a language model takes where none is named: emu3-mini has its own."""
    return MINI if name_or_path == MINI else "BAAI/Emu3-VisionTokenizer"


def _refuse_pickle(name_or_path, name):
    raise InputError(
        f"{str(name_or_path)!r} holds {name}, a pickle: loading one can run any program, so it is "
        f"refused; convert it to {SINGLE_NAME} with the tool that made it"
    )


def _fetch_from_hub(name, required, optional):
    import requests
    from huggingface_hub import configure_http_backend, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    class Session(requests.Session):  # without it a hub that does not answer is waited for without end
        def request(self, *args, timeout=None, **kwargs):
            return super().request(*args, timeout=timeout or HUB_TIMEOUT, **kwargs)

    configure_http_backend(Session)
    files = [*required, *optional]
    try:  # what is in the cache needs no network; a checkpoint's files do not change
        path = Path(snapshot_download(name, allow_patterns=files, local_files_only=True))
        if all((path / f).is_file() for f in required) and (required or any((path / f).is_file() for f in optional)):
            return path
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise InputError(f"no checkpoint at {name!r}: it is no directory, and no name that the hub can have") from None
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except GatedRepoError:
        reason = "it asks for a login: accept its terms on the hub, then run `huggingface-cli login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such checkpoint, or it is private: check the name, or run `huggingface-cli login`"
    except LocalEntryNotFoundError:
        reason = (
            "it is not in the local cache and the hub is out of reach: connect to the network, set HF_ENDPOINT "
            "to a mirror, or give the directory of a downloaded checkpoint"
        )
    except HfHubHTTPError as error:
        reason = f"the hub answered {str(error).splitlines()[0]!r}: try again later"
    except (OSError, requests.RequestException) as error:
        reason = f"{error}: check the network, the disk and the cache directory, then try again"
    raise InputError(f"cannot fetch {name}: {reason}")


# --- one file --------------------------------------------------------------------------------------------


class SafetensorsFile:
    """A safetensors file, memory-mapped. `shapes`, `dtypes`, `sizes` in bytes by tensor name; `read` gives an array."""

    def __init__(self, path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="np") as file:  # checks the header and that the file is whole
                names = file.offset_keys()
                slices = {name: file.get_slice(name) for name in names}
                self.dtypes = {name: slices[name].get_dtype() for name in names}
                self.shapes = {name: slices[name].get_shape() for name in names}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or not a safetensors file ({error}): download it again") from None
        import ml_dtypes  # noqa: F401  makes numpy know bfloat16
        import numpy as np

        for name, dtype in self.dtypes.items():
            if dtype not in DTYPES:
                raise InputError(f"{path}: tensor {name} is {dtype}; accepted are {', '.join(DTYPES)}")
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # tensors follow each other without gaps, in the order of their offsets, to the end of the file
        self.offsets, self.sizes, offset = {}, {}, 8 + int.from_bytes(self.map[:8], "little")
        for name in names:
            self.offsets[name] = offset
            self.sizes[name] = math.prod(self.shapes[name]) * np.dtype(DTYPES[self.dtypes[name]]).itemsize
            offset += self.sizes[name]
        self.asked = self.released = 0

    def read(self, name, dtype, on_bytes=lambda n: None):
        """The tensor as a new numpy array of `dtype`.

        InputError where it holds NaN, infinity, or numbers that are infinite in `dtype`.
        """
        import numpy as np

        out = np.empty(math.prod(self.shapes[name]), dtype)
        for start, chunk in self._chunks(name, out.dtype, 1, on_bytes):
            out[start : start + chunk.size] = chunk
        return out.reshape(self.shapes[name])

    def read_quantized(self, name, bits, on_bytes=lambda n: None):
        """The tensor [out, in] as (weight, scale), new numpy arrays as few_rows_linear.quantize gives them.

        It is quantized some rows at a time, while it is read.
        """
        import numpy as np

        from paddlemix.external_ops.few_rows_linear import quantize

        rows, columns = self.shapes[name]
        dtype, out = np.dtype("float32") if self.dtypes[name] == "F64" else DTYPES[self.dtypes[name]], None
        for start, chunk in self._chunks(name, np.dtype("float32"), columns, on_bytes):
            first, part = start // columns, chunk.reshape([-1, columns]).astype(dtype)
            parts = [tensor.numpy() for tensor in quantize(_to_tensor(part), bits)]
            out = out or [np.empty([rows, *p.shape[1:]], p.dtype) for p in parts]
            for array, p in zip(out, parts, strict=True):
                array[first : first + len(p)] = p
        return out

    def _array(self, name):
        """The tensor's numbers in the map, one after the other."""
        import numpy as np

        return np.ndarray(math.prod(self.shapes[name]), DTYPES[self.dtypes[name]], self.map, self.offsets[name])

    def _chunks(self, name, dtype, multiple, on_bytes):
        """(first, array): a tensor's numbers in parts of a multiple of `multiple`, fit for `dtype`."""
        source, unreleased = self._array(name), 0
        step = max(1, CHUNK_BYTES // (source.itemsize * multiple)) * multiple
        for start in range(0, source.size, step):
            chunk = source[start : start + step]
            self._ask(self.offsets[name] + start * source.itemsize)
            self._check_range(name, chunk, dtype)
            yield start, chunk
            on_bytes(chunk.nbytes)
            unreleased += chunk.nbytes
            if unreleased >= RELEASE_BYTES:
                self._release(self.offsets[name] + (start + chunk.size) * source.itemsize)
                unreleased = 0
        self._release(self.offsets[name] + source.nbytes)

    def _check_range(self, name, chunk, dtype):
        import numpy as np

        if chunk.dtype.kind in "iu":
            return
        if chunk.itemsize == 2 and dtype != np.float16:
            # infinity and NaN have all bits of the exponent set
            exponent = np.uint16(0x7C00 if chunk.dtype == np.float16 else 0x7F80)
            is_finite, largest = not ((chunk.view(np.uint16) & exponent) == exponent).any(), 0
        else:
            chunk = chunk if chunk.itemsize > 2 else chunk.astype(np.float32)
            largest = max(chunk.max(), -chunk.min())  # NaN if there is one
            is_finite = np.isfinite(largest)
        if not is_finite:
            raise InputError(f"{self.path}: tensor {name} holds NaN or infinity: download the file again")
        if dtype == np.float16 and largest >= 65520:
            raise InputError(f"{self.path}: tensor {name} holds numbers too large for float16: take bfloat16")

    def _ask(self, start):
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        end, start = min(start + AHEAD_BYTES, len(self.map)), max(start, self.asked)
        start -= start % mmap.PAGESIZE
        if end > start:
            self.map.madvise(mmap.MADV_WILLNEED, start, end - start)
            self.asked = end

    def _release(self, end):
        if not hasattr(mmap, "MADV_DONTNEED"):  # not every system has it; memory is then freed on closing
            return
        end -= end % mmap.PAGESIZE
        if end > self.released:
            self.map.madvise(mmap.MADV_DONTNEED, self.released, end - self.released)
            self.released = end

    def close(self):
        self.map.close()


# --- a checkpoint of one or more files -------------------------------------------------------------------


def open_weights(name_or_path, part="language_model"):
    """{tensor name: SafetensorsFile that holds it} of a directory or hub name."""
    path = fetch(name_or_path, [], [SINGLE_NAME, INDEX_NAME], part)
    if (path / SINGLE_NAME).is_file():
        file = SafetensorsFile(path / SINGLE_NAME)
        return dict.fromkeys(file.shapes, file)
    if not (path / INDEX_NAME).is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            _refuse_pickle(name_or_path, pickles[0])
        raise InputError(f"{str(name_or_path)!r} has neither {SINGLE_NAME} nor {INDEX_NAME}: download it again")
    weight_map = _read_index(path / INDEX_NAME)
    path = fetch(name_or_path, sorted(set(weight_map.values())), part=part)
    files = {name: SafetensorsFile(path / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name].shapes:
            raise InputError(f"{path / name} lacks {tensor}, which {INDEX_NAME} says it holds: download it again")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _read_index(path):
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not an index of safetensors shards: download it again") from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"{path} names a shard {name!r}: a shard must be a .safetensors file beside it")
    return weight_map


def available_memory():
    """Bytes of memory that a model can still take: the machine's, or the container's where that is less."""
    import psutil

    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return free
        used = int((group / "memory.current").read_text())
        # files that were read are counted as used, and are given up when a program asks for memory
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(counts["inactive_file"]) + int(counts["active_file"])
        return min(free, int(limit) - used)
    except (OSError, ValueError, KeyError):
        return free


def require_memory(size, purpose):
    """InputError where the device has less than `size` bytes free."""
    import paddle

    if paddle.get_device() == "cpu":
        free, place = available_memory(), "memory"
    else:
        card = paddle.device.cuda.get_device_properties()
        free, place = card.total_memory - paddle.device.cuda.memory_reserved(), "memory on the card"
    if size > free:
        raise InputError(
            f"{size / 1e9:.1f} GB of {place} {purpose} are needed and {free / 1e9:.1f} GB are free: close other "
            "programs, take a machine with more, or a dtype of fewer bits where the device has it"
        )


class CheckpointMixin:
    """`from_pretrained` and `save_pretrained` for a paddle.nn.Layer whose names are the checkpoint's.

    A class says in `config_class` what describes it.
    """

    config_class = None
    dtypes = ("float32", "float16", "bfloat16")
    checkpoint_prefix = ""  # of this layer's names in a checkpoint
    tied_weights = ()  # names that a checkpoint may hold, and that are not this layer's or not its own

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=None, config=None, progress=True, **overrides):
        """A model with the weights of a checkpoint in the released layout, in eval mode.

        Args:
            name_or_path: a directory, a hub name (fetched into huggingface_hub's cache; HF_ENDPOINT and
                HF_HUB_OFFLINE are honoured), or "emu3-mini".
            dtype: "float32", "float16" or "bfloat16": what the weights are cast to while they are read; or, of a
                language model, "int8" or "int4": what its linear layers are quantized to, while they are read (a
                float32 embedding becomes bfloat16, the norms stay). None is float32, and for a checkpoint that is
                quantized what it holds.
            config: a configuration in place of the checkpoint's.
            progress: show a progress bar (on a terminal).
            overrides: configuration values in place of the checkpoint's.

        Raises:
            InputError (a ValueError): files missing, truncated, corrupt, or of another model; not enough memory.
        """
        import paddle
        from tqdm import tqdm

        dtype = dtype and dtype_name(dtype)
        if dtype not in (None, *cls.dtypes):
            raise InputError(f"dtype must be one of {', '.join(cls.dtypes)}, got {dtype!r}")
        for name in overrides:
            if not hasattr(cls.config_class, name):
                raise TypeError(f"{cls.__name__}.from_pretrained() got an unexpected keyword argument {name!r}")
        config = config or cls.config_class.from_pretrained(name_or_path, **overrides)
        quantized = config.quantized_dtype
        if quantized and dtype not in (None, quantized):
            raise InputError(f"{name_or_path} is {quantized}, it cannot become {dtype}: take what it was made from")
        dtype = quantized or dtype or "float32"
        with paddle.LazyGuard():  # no weight is made before the checkpoint's own takes its place
            model = cls(config)
            in_files = state = model._checkpoint_state()
            if dtype in QUANTIZATIONS and not quantized:
                model = cls(config.quantized(dtype))
                state = model._checkpoint_state()
        require_memory(_size(state, dtype), f"in {dtype} for {name_or_path}")
        weights = open_weights(name_or_path, cls.config_class.part)
        try:
            _check_names_and_shapes(name_or_path, in_files, weights, model.tied_weights)
            total = sum(file.sizes[name] for name, file in weights.items())
            disable = None if progress else True  # None shows it on a terminal alone
            bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", leave=False, disable=disable)
            with bar:
                # in the order of the files, so that each is read from its start to its end
                for name in sorted(weights, key=lambda n: (str(weights[n].path), weights[n].offsets[n])):
                    if name + "_scale" in state and not quantized:
                        bits = QUANTIZATIONS[dtype]["bits"]
                        parts = weights[name].read_quantized(name, bits, bar.update)
                        for target, array in zip((state[name], state[name + "_scale"]), parts, strict=True):
                            _share(array, target)
                    elif name in state:
                        _assign(state[name], weights[name], name, dtype, bar.update)
        finally:
            for file in set(weights.values()):
                file.close()
        if dtype in QUANTIZATIONS and paddle.get_device() != "cpu":
            from .weight_only import use_weight_only_kernels

            del in_files, state  # each layer's first weights go when it has its new ones
            use_weight_only_kernels(model)
        return model.eval()

    def save_pretrained(self, directory, max_shard_bytes=5_000_000_000):
        """Write config.json and safetensors in the released layout, in shards where they are larger than given.

        The original's own loader and transformers-style tools read the result.

        Raises:
            InputError: the model is int8 or int4 and on a GPU, where its weights lie as the kernels there want them.
        """
        import paddle

        if (dtype := self.config.quantized_dtype) and paddle.get_device() != "cpu":
            raise InputError(f"{dtype} weights are not saved from a GPU: load and save them on a CPU")
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
                write_safetensors(temporary, layout, lambda name: _to_array(state[name]))
        names += [INDEX_NAME] if len(shards) > 1 else []
        for path in directory.iterdir():  # what an earlier save left would be read in place of this one
            is_weights = path.name in (SINGLE_NAME, INDEX_NAME) or SHARD_PATTERN.fullmatch(path.name)
            if is_weights and path.name not in names:
                path.unlink()

    def _checkpoint_state(self):
        """{checkpoint name: parameter or buffer}"""
        state = {self.checkpoint_prefix + name: tensor for name, tensor in self.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if name not in self.tied_weights}


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


def write_safetensors(path, layout, read):
    """Write {name: (dtype, shape)}, and of each name what `read` gives, a numpy array, one at a time.

    The library's own function would hold all of the file in memory once more.
    """
    import ml_dtypes  # noqa: F401  makes numpy know bfloat16
    import numpy as np

    names = {dtype: name for name, dtype in DTYPES.items()}
    # the widest first, as the library orders them: so each begins at a multiple of its numbers' size
    order = sorted(layout, key=lambda name: (-np.dtype(layout[name][0]).itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        dtype, shape = layout[name]
        start, end = end, end + np.dtype(dtype).itemsize * math.prod(shape)
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(read(name).reshape(-1).view(np.uint8).data)


def _check_names_and_shapes(name_or_path, state, weights, optional):
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
        expected, found = list(tensor.shape), list(weights[name].shapes[name])
        if found != expected:
            raise InputError(
                f"{weights[name].path}: tensor {name} is {found}, config.json asks for {expected}: "
                "config.json or the shard is another model's"
            )


def _assign(target, file, name, dtype, on_bytes):
    """Put a tensor of a file into a parameter (which has no memory yet) or a buffer (which keeps its dtype)."""
    import ml_dtypes  # noqa: F401  makes numpy know bfloat16
    import numpy as np
    import paddle

    if not isinstance(target, paddle.base.framework.EagerParamBase):
        array = file.read(name, dtype_name(target.dtype), on_bytes)
        target.set_value(paddle.to_tensor(array))
        return
    if dtype in QUANTIZATIONS:  # what is not quantized stays as it is, but for the one large tensor
        stored = DTYPES[file.dtypes[name]]
        is_wide = stored in ("float32", "float64") or name.endswith("_scale")  # the operators take float32 scales
        is_embedding = name.endswith("embed_tokens.weight")
        dtype = ("bfloat16" if is_embedding else "float32") if is_wide else stored
    _share(file.read(name, np.dtype(dtype), on_bytes), target)


def _share(array, target):
    """Let a parameter take the memory of a numpy array, on a card a copy of it."""
    import paddle

    tensor, device = _to_tensor(array), paddle.get_device()
    (tensor if device == "cpu" else tensor.to(device))._share_underline_tensor_to(target)


def _to_tensor(array):
    """A tensor that shares a numpy array's memory; dlpack knows no bfloat16, so that goes as integers."""
    import numpy as np
    import paddle

    if array.dtype == "bfloat16":
        return paddle.utils.dlpack.from_dlpack(array.view(np.int16)).view("bfloat16")
    return paddle.utils.dlpack.from_dlpack(array)


def _to_array(tensor):
    """A numpy array; Paddle gives bfloat16 as the integers it is stored as."""
    import ml_dtypes

    array = tensor.detach().cpu().numpy()
    return array.view(ml_dtypes.bfloat16) if array.dtype == "uint16" else array
