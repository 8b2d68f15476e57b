# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Custom operators. `python -m paddlemix.external_ops.build` builds them as the module `emu3_ops`; README.md shows how
one is made.

Each operator has a wrapper in a module of its own. A wrapper checks its arguments in one place and computes with the
compiled module or, the same, with Paddle. Three kinds need the compiled module, and their callers ask `operators()`
first: those that join the work of others (decoder_step), those of the vision tokenizer, where oneDNN stands in
(winograd_conv, spatial_norm), and those of training, where Paddle's gradients do (float_product, causal_attention,
fused_cross_entropy).

In the environment, EMU3_OPS=0 leaves the compiled operators out (1: takes them), and EMU3_OPS_SIMD=plain, avx2 or
avx512 keeps them from better instructions (all three from products of integers; best: from none), for tests. Other
values are an InputError when this package is imported.
"""

import contextlib
import ctypes
import functools
import logging
import os
import reprlib
from pathlib import Path

import paddle

from paddlemix.utils import InputError

OPERATORS = (
    "fused_rms_norm", "fused_ln", "nearest_codeword", "few_rows_linear", "quantize_weight", "cached_attention",
    "decoder_step", "winograd_conv", "spatial_norm", "pick_token", "accept_tokens", "float_product",
    "causal_attention", "fused_cross_entropy", "silu_and_mul", "square_sum",
)  # fmt: skip
VERSION = 5  # of what the operators take, as in info.cc
VECTORS = ("plain", "AVX2", "AVX-VNNI", "AVX-512", "AVX-512 VNNI")  # as simd.h's Level

SETTINGS = {"EMU3_OPS": ("0", "1"), "EMU3_OPS_SIMD": ("plain", "avx2", "avx512", "best")}
for _name, _values in SETTINGS.items():
    _given = os.environ.get(_name) or _values[-1]
    if _given not in _values:
        raise InputError(f"{_name} is {reprlib.repr(_given)}: accepted are {', '.join(_values)}, or unset it")

_left_out = 0  # times that `without_operators` is entered


def operators():
    """The compiled module; None where there is none, and inside `without_operators`. Where it is missing the first
    call logs a note with the reason and the command that builds it."""
    if _left_out:
        return None
    _note()
    return _found()[0]


def status():
    """(the compiled module or None, why there is none or None), without the note."""
    return (None, "are left out by without_operators()") if _left_out else _found()


@contextlib.contextmanager
def without_operators():
    """Inside it `operators()` is None everywhere, in all threads: for tests and comparisons."""
    global _left_out
    _left_out += 1
    try:
        yield
    finally:
        _left_out -= 1


def vectors():
    """The instructions that the compiled operators use on this processor, a name of VECTORS; None without them."""
    return None if status()[0] is None else VECTORS[_library().emu3_ops_level()]


def build_command():
    """The command that builds the operators here."""
    checkout = Path(__file__).resolve().parents[2]
    is_checkout = (checkout / "Makefile").exists() and (checkout / "paddlemix" / "external_ops").exists()
    return "make ops" if is_checkout else "python -m paddlemix.external_ops.build"


@functools.cache
def _found():
    if os.environ.get("EMU3_OPS") == "0":
        return None, "are left out by EMU3_OPS=0"
    try:
        import emu3_ops

        missing = [name for name in OPERATORS if not hasattr(emu3_ops, name)]
        version = None if missing else getattr(_library(), "emu3_ops_version", lambda: 1)()
    except ModuleNotFoundError:
        return None, "are not built"
    except (ImportError, RuntimeError, OSError) as error:  # Paddle's loader raises RuntimeError, of many lines
        return None, f"do not load ({' '.join(str(error).split())[:200]})"
    if missing:
        return None, f"are of another version (they lack {', '.join(missing)})"
    if version != VERSION:
        return None, f"are of another version ({version}, not {VERSION})"
    return emu3_ops, None


@functools.cache
def _library():
    """The compiled module's library, for C functions that take no tensors."""
    import emu3_ops

    return ctypes.CDLL(str(next(Path(emu3_ops.__file__).parent.glob("emu3_ops*.so"))))


@functools.cache
def _note():
    module, why = _found()
    if module is None and os.environ.get("EMU3_OPS") != "0":
        logging.getLogger(__name__).warning(
            "paddlemix.external_ops: the operators %s, Paddle's are used: slower; `%s` builds them",
            why, build_command(),
        )  # fmt: skip


def card_fault(card, kind, compare, capability=None, instead="Paddle's operators"):
    """Why the CUDA kernels of one kind, named in words, are not used on a card; None where they are.

    `compare()` gives what is wrong with them beside Paddle's operators there, in words, or None. It is logged, with
    what is used instead. capability: the compute capability that they need.
    """
    if not hasattr(operators(), "emu3_ops_cuda"):
        return f"the CUDA operators are not built, `{build_command()}` builds them"
    if capability and (has := paddle.device.cuda.get_device_capability(card)) < capability:
        return "the card has compute capability {}.{}, the kernel needs {}.{}".format(*has, *capability)
    try:
        fault = compare()
    except (RuntimeError, OSError, ValueError) as error:  # CUDA's own errors come as OSError
        fault = f"{kind} fails on this card ({' '.join(str(error).split())[:200]})"
    if fault:
        logging.getLogger(__name__).warning("%s: %s are used, slower", fault, instead)
    return fault


def wants_gradient(*tensors):
    return paddle.is_grad_enabled() and not all(t.stop_gradient for t in tensors)


def operators_for(*tensors):
    """The compiled module where it computes on the device that the tensors are on, else None."""
    ops = operators()
    on_gpu = any(tensor.place.is_gpu_place() for tensor in tensors)
    return None if on_gpu and not hasattr(ops, "emu3_ops_cuda") else ops
