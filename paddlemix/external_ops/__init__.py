# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Custom operators. `make ops` builds them as the module `emu3_ops`; without it the same is computed with Paddle.

In the environment, EMU3_OPS=0 leaves them out, and EMU3_OPS_SIMD=plain, avx2 or avx512 keeps them from better
instructions (avx512: from AVX-512 VNNI), for tests.
"""

import functools
import logging
import os

import paddle

OPERATORS = (
    "fused_rms_norm", "fused_ln", "nearest_codeword", "few_rows_linear", "quantize_weight", "cached_attention",
    "decoder_step", "winograd_conv", "spatial_norm",
)  # fmt: skip


@functools.cache
def operators():
    """The compiled module, None where there is none."""
    if os.environ.get("EMU3_OPS") == "0":
        return None
    try:
        import emu3_ops

        missing = [name for name in OPERATORS if not hasattr(emu3_ops, name)]
        why = f"are of another version (they lack {', '.join(missing)})" if missing else None
    except ModuleNotFoundError:
        why = "are not built"
    except (ImportError, RuntimeError, OSError) as error:  # Paddle's loader raises RuntimeError, of many lines
        why = f"do not load ({' '.join(str(error).split())[:200]})"
    if why:
        logging.getLogger(__name__).warning(
            "paddlemix.external_ops: the operators %s, Paddle's are used: slower; `make ops` builds them", why
        )
        return None
    return emu3_ops


def wants_gradient(*tensors):
    return paddle.is_grad_enabled() and not all(t.stop_gradient for t in tensors)


def operators_for(*tensors):
    """The compiled module where it computes on the device that the tensors are on, else None."""
    ops = operators()
    on_gpu = any(tensor.place.is_gpu_place() for tensor in tensors)
    return None if on_gpu and not hasattr(ops, "emu3_ops_cuda") else ops
