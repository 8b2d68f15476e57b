# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One safetensors file: read through a memory map, a few megabytes at a time, and written one tensor at a time.

The pages read are handed back to the system at once, so that loading takes little more memory than the loaded model.
"""

import json
import math
import mmap
import os

from paddlemix.utils import InputError

# safetensors' names of the number types that a checkpoint may hold -> numpy's and ml_dtypes' names
DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "I8": "int8",
    "U8": "uint8",
}  # fmt: skip
RELEASE_BYTES = 64 << 20  # pages read are handed back to the system after so many bytes
AHEAD_BYTES = 64 << 20  # what the system is asked for before it is read: by itself it fetches small pieces of a map
CHUNK_BYTES = 8 << 20


class SafetensorsFile:
    """A safetensors file, memory-mapped. `shapes`, `dtypes`, `sizes` in bytes by tensor name; `read` gives an array."""

    def __init__(self, path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with open(path, "rb") as file:  # first: safe_open has one word for all that the system refuses
                is_empty = not os.fstat(file.fileno()).st_size  # which cannot be mapped
                self.map = b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with safe_open(path, framework="np") as file:  # checks the header and that the file is whole
                names = file.offset_keys()
                slices = {name: file.get_slice(name) for name in names}
                self.dtypes = {name: slices[name].get_dtype() for name in names}
                self.shapes = {name: slices[name].get_shape() for name in names}
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{path} cannot be read ({reason}): check who may read it, and the disk") from None
        except SafetensorError as error:
            raise InputError(f"{path} is truncated or not a safetensors file ({error}): download it again") from None
        import ml_dtypes  # noqa: F401  makes numpy know bfloat16
        import numpy as np

        for name, dtype in self.dtypes.items():
            if dtype not in DTYPES:
                raise InputError(f"{path}: tensor {name} is {dtype}; accepted are {', '.join(DTYPES)}")
        # tensors follow each other without gaps, in the order of their offsets, to the end of the file
        self.offsets, self.sizes, offset = {}, {}, 8 + int.from_bytes(self.map[:8], "little")
        for name in names:
            self.offsets[name] = offset
            self.sizes[name] = math.prod(self.shapes[name]) * np.dtype(DTYPES[self.dtypes[name]]).itemsize
            offset += self.sizes[name]
        self.asked = self.released = 0
        self.deltas = {}  # {tensor name: adapter.Delta}, added to its rows while they are read

    def read(self, name, dtype, on_bytes=lambda n: None, part=None):
        """The tensor, or a parallel.Part of it, as a new numpy array of `dtype`.

        InputError where it holds NaN, infinity, or numbers that are infinite in `dtype`.
        """
        import numpy as np

        shape, end = list(self.shapes[name]), 0
        if part and part.rows:
            shape[0] = sum(rows.stop - rows.start for rows in part.rows)
        if part and part.columns:
            shape[1] = part.columns.stop - part.columns.start
        out = np.empty(math.prod(shape), dtype)
        for chunk in self.chunks(name, out.dtype, 1, on_bytes, part):
            out[end : end + chunk.size] = chunk.reshape(-1)
            end += chunk.size
        return out.reshape(shape)

    def equals(self, name, other, other_name):
        """Whether a tensor is, to the last bit, that of another file or name."""
        one, other = self._array(name), other._array(other_name)
        return one.dtype == other.dtype and one.size == other.size and all(
            one[i : i + CHUNK_BYTES].tobytes() == other[i : i + CHUNK_BYTES].tobytes()
            for i in range(0, one.size, CHUNK_BYTES)
        )  # fmt: skip

    def _array(self, name):
        """The tensor's numbers in the map, one after the other."""
        import numpy as np

        return np.ndarray(math.prod(self.shapes[name]), DTYPES[self.dtypes[name]], self.map, self.offsets[name])

    def chunks(self, name, dtype, multiple, on_bytes=lambda n: None, part=None):
        """A tensor's numbers, or those of a parallel.Part, one array after the other, each of a multiple of `multiple`,
        views of the file, fit for `dtype`; or float32 where there is something to add. Of whole rows there and where
        the part has some columns, and of these [rows, columns].

        InputError where a part holds NaN, infinity, or numbers that are infinite in `dtype`.
        """
        source, unreleased, delta = self._array(name), 0, self.deltas.get(name)
        rows, columns = (part.rows, part.columns) if part else (None, None)
        width = math.prod(self.shapes[name][1:])
        multiple = multiple if delta is None and not columns else width
        step = max(1, CHUNK_BYTES // (source.itemsize * multiple)) * multiple
        for first, last in [(r.start * width, r.stop * width) for r in rows] if rows else [(0, source.size)]:
            end_of_part = self.offsets[name] + last * source.itemsize if rows else len(self.map)
            for start in range(first, last, step):
                chunk = source[start : min(start + step, last)]
                end, read = self.offsets[name] + (start + chunk.size) * source.itemsize, chunk.nbytes
                self._ask(end - read, end_of_part)
                chunk = chunk if delta is None else delta.added_to(chunk, start)
                if columns:
                    chunk = chunk.reshape([-1, width])[:, columns]
                    read = chunk.size * source.itemsize
                self._check_range(name, chunk, dtype)
                yield chunk
                on_bytes(read)
                unreleased += read
                if unreleased >= RELEASE_BYTES:
                    self._release(end)
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

    def _ask(self, start, end):
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        end, start = min(start + AHEAD_BYTES, end), max(start, self.asked)
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
