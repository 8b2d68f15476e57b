# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Convolution, group norm and matrix product by oneDNN, the library that Paddle's own CPU packages bring.

Paddle's eager operators do not use it; called directly, its convolutions reach what the cores can do. Pictures are
float32 NumPy arrays with the channels last, [1, H, W, C]. Weights are read where Paddle holds them, laid out as
oneDNN wants them for one call, and nothing is kept: the next call sees the weights as they are then.
The C interface: https://uxlfoundation.github.io/oneDNN
"""

import contextlib
import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from pathlib import Path

import numpy as np
import paddle

from paddlemix.machine import available_cores

from .reused_memory import empty

LIBRARIES = Path(paddle.__file__).parent / "libs"

# values of the C interface's enumerations
CPU, IN_ORDER, STRICT, FORMAT_ANY, F32, INFERENCE, DIRECT = 1, 1, 0, 1, 3, 96, 1
SWISH, MULTIPLY, SOFTMAX, USE_SCALE, USE_SHIFT, WEIGHTS_DESC = 0x2C, 0x1FFF1, 0x30000, 2, 4, 131
SRC, SRC_1, DST, WEIGHTS, BIAS, SCALE, SHIFT, FIRST_POST_OP = 1, 2, 17, 33, 41, 51, 52, 1 << 15


class _Version(ctypes.Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int)]


class _Argument(ctypes.Structure):
    _fields_ = [("kind", c_int), ("memory", c_void_p)]


@functools.cache
def load():
    """The library, or None where this Paddle has none, or one of another interface."""
    try:
        library = ctypes.CDLL(str(LIBRARIES / "libdnnl.so.3"))
        library.dnnl_version.restype = ctypes.POINTER(_Version)
        version = library.dnnl_version().contents
    except (OSError, AttributeError):
        return None
    library.dnnl_primitive_desc_query_md.restype = c_void_p
    library.dnnl_memory_desc_get_size.restype = c_size_t
    return library if version.major == 3 and version.minor >= 4 else None


@contextlib.contextmanager
def all_cores():
    """As many threads as the process has cores, or OMP_NUM_THREADS says, or Paddle was told if that is more."""
    # Paddle's OpenMP is the one that computes, with 1 thread unless told; the system's, on which the library was
    # built, has read OMP_NUM_THREADS before Paddle's import sets it to 1
    system = load()
    openmp = ctypes.CDLL(str(LIBRARIES / "libiomp5.so")) if (LIBRARIES / "libiomp5.so").exists() else system
    before = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(max(before, min(system.omp_get_max_threads(), available_cores())))
    try:
        yield
    finally:
        openmp.omp_set_num_threads(before)


def _call(function, *arguments):
    status = getattr(load(), f"dnnl_{function}")(*arguments)
    if status == 1:
        raise MemoryError(f"oneDNN: dnnl_{function} found no memory")
    if status:
        raise RuntimeError(f"oneDNN: dnnl_{function} gave status {status}")


class _Object:
    """An object of the library, freed with this one. `kind` is its name in the names of the functions."""

    def __init__(self, kind, create, *arguments):
        self.kind, self._as_parameter_ = kind, c_void_p()
        self.used = arguments  # the library does not keep them alive
        _call(create, byref(self._as_parameter_), *arguments)

    def __del__(self):
        getattr(load(), f"dnnl_{self.kind}_destroy")(self._as_parameter_)


@functools.cache
def _engine():
    return _Object("engine", "engine_create", CPU, c_size_t(0))


@functools.cache
def _stream():
    return _Object("stream", "stream_create", _engine(), IN_ORDER)


def _integers(*values):
    return (c_int64 * 12)(*values)


def _desc(shape, strides=None):
    """Float32 numbers of a shape, row by row unless strides are given."""
    strides = strides and _integers(*strides)
    return _Object("memory_desc", "memory_desc_create_with_strides", len(shape), _integers(*shape), F32, strides)


def _picture(x):
    """[N, H, W, C] in memory; the library counts axes as N, C, H, W wherever they lie"""
    n, h, w, c = x.shape
    return _desc((n, c, h, w), (h * w * c, 1, w * c, c))


def _array(data):
    """An array, transposed in memory or not, or a Paddle tensor, which lies row by row."""
    return _desc(data.shape, [s // 4 for s in data.strides] if isinstance(data, np.ndarray) else None)


def _memory(desc, data):
    """Where an array or a Paddle tensor lies."""
    pointer = data.ctypes.data if isinstance(data, np.ndarray) else data.data_ptr()
    return _Object("memory", "memory_create", desc, _engine(), c_void_p(pointer))


def _attributes(add_to_output=False, multiply=None, silu=False):
    """What is done with a result before it is written: dst = silu(dst + result), or of result * multiply."""
    attributes = _Object("primitive_attr", "primitive_attr_create")
    _call("primitive_attr_set_fpmath_mode", attributes, STRICT)  # float32 arithmetic, whatever the environment says
    then = _Object("post_ops", "post_ops_create")
    if multiply is not None:
        _call("post_ops_append_binary", then, MULTIPLY, _picture(multiply))
    if add_to_output:
        _call("post_ops_append_sum", then, c_float(1), 0, F32)
    if silu:
        _call("post_ops_append_eltwise", then, SWISH, c_float(1), c_float(0))
    _call("primitive_attr_set_post_ops", attributes, then)
    return attributes


def _run(desc, memories):
    primitive = _Object("primitive", "primitive_create", desc)
    arguments = (_Argument * len(memories))(*((kind, m._as_parameter_) for kind, m in memories.items()))
    _call("primitive_execute", primitive, _stream(), len(memories), arguments)
    _call("stream_wait", _stream())


def conv2d(x, weight, bias, stride=1, padding=(0, 0), add_to=None, multiply=None, silu=False):
    """Convolution [1, H, W, C] -> [1, H', W', D].

    Args:
        weight, bias: [D, C, k, k] and [D], Paddle tensors or arrays.
        padding: zeros before and after, in both directions.
        add_to: the result is added to this array, in place.
        multiply: the result is multiplied by this array of its shape.
        silu: x * sigmoid(x) of all that.
    """
    n, h, w, _ = x.shape
    height, width = ((side + sum(padding) - weight.shape[-1]) // stride + 1 for side in (h, w))
    out = empty([n, height, width, weight.shape[0]]) if add_to is None else add_to
    before, after = (_integers(p, p) for p in padding)
    any_layout = _Object("memory_desc", "memory_desc_create_with_tag", 4, _integers(*weight.shape), F32, FORMAT_ANY)
    vector = _desc(bias.shape)
    conv = _Object(
        "primitive_desc", "convolution_forward_primitive_desc_create", _engine(), INFERENCE, DIRECT, _picture(x),
        any_layout, vector, _picture(out), _integers(stride, stride), _integers(0, 0), before, after,
        _attributes(add_to is not None, multiply, silu),
    )  # fmt: skip
    # the weights in the layout that this convolution asks for
    layout = c_void_p(load().dnnl_primitive_desc_query_md(conv, WEIGHTS_DESC, 0))
    laid_out = np.empty(load().dnnl_memory_desc_get_size(layout), np.uint8)
    plain, blocked = _memory(_array(weight), weight), _memory(layout, laid_out)
    reorder = _Object(
        "primitive_desc", "reorder_primitive_desc_create", plain.used[0], _engine(), layout, _engine(), None
    )
    _run(reorder, {SRC: plain, DST: blocked})
    memories = {SRC: _memory(_picture(x), x), WEIGHTS: blocked, BIAS: _memory(vector, bias),
                DST: _memory(_picture(out), out)}  # fmt: skip
    if multiply is not None:
        memories[FIRST_POST_OP | SRC_1] = _memory(_picture(multiply), multiply)
    _run(conv, memories)
    return out


def group_norm(x, weight, bias, groups, epsilon, silu=False):
    """[1, H, W, C] -> a new array, silu(x) = x * sigmoid(x) of it where asked."""
    out, picture, vector = empty(x.shape), _picture(x), _desc(weight.shape)
    norm = _Object(
        "primitive_desc", "group_normalization_forward_primitive_desc_create", _engine(), INFERENCE, picture, picture,
        c_int64(groups), c_float(epsilon), c_uint(USE_SCALE | USE_SHIFT), _attributes(silu=silu),
    )  # fmt: skip
    _run(norm, {SRC: _memory(picture, x), DST: _memory(picture, out), SCALE: _memory(vector, weight),
                SHIFT: _memory(vector, bias)})  # fmt: skip
    return out


def matmul(a, b):
    """Matrix product of arrays [M, K] and [K, N], either of them transposed in memory or not."""
    out = empty([a.shape[0], b.shape[1]])
    descs = [_array(t) for t in (a, b, out)]
    product = _Object(
        "primitive_desc", "matmul_primitive_desc_create", _engine(), descs[0], descs[1], None, descs[2], _attributes()
    )
    _run(product, {kind: _memory(d, t) for kind, d, t in zip((SRC, WEIGHTS, DST), descs, (a, b, out), strict=True)})
    return out


def softmax(x):
    """Of each row of an array [M, N], in its place."""
    rows = _array(x)
    function = _Object(
        "primitive_desc", "softmax_forward_primitive_desc_create", _engine(), INFERENCE, SOFTMAX, rows, rows, 1,
        _attributes(),
    )  # fmt: skip
    memory = _memory(rows, x)
    _run(function, {SRC: memory, DST: memory})
