# Licensed under the Apache License, Version 2.0; see LICENSE.
"""int8 and int4 linear layers on a GPU: Paddle's weight-only kernels (paddle.nn.quant)."""

import paddle
from paddle import nn
from paddle.nn import quant

from paddlemix.external_ops.few_rows_linear import GROUP, dequantize
from paddlemix.utils import InputError

TOLERANCE = 0.02  # 16 bits and their sums err by less; wrongly laid out weights err by more than 1


class WeightOnlyLinear(nn.Layer):
    """An Emu3Linear of int8 or int4 for 16-bit activations on a GPU.

    Its weight has the same levels, in the order of the kernels; its scales are of the activations' dtype, [out], or of
    int4 [in / 128, out].

    Args:
        linear: the Emu3Linear; it is not changed.
        dtype: of the activations, "float16" or "bfloat16".

    Raises:
        InputError: the kernels do not take the layer, or do not compute it rightly, on this card.
    """

    def __init__(self, linear, dtype):
        super().__init__()
        weight, scale, in_features = linear.weight, linear.weight_scale, linear.in_features
        self.bits, self.group_size = (8, -1) if weight.dtype == paddle.int8 else (4, GROUP)
        # quantized once more as whole numbers, which keeps them: of each scale's numbers one is the largest level
        levels = dequantize(weight, paddle.ones_like(scale), in_features).astype("float16")
        try:
            packed, _ = quant.weight_quantize(
                levels.T.contiguous(), f"weight_only_int{self.bits}", group_size=self.group_size
            )
            self.register_buffer("weight", packed)
            self.register_buffer("weight_scale", scale.T.astype(dtype).contiguous())
            x = paddle.cos(paddle.arange(2 * in_features, dtype="float32")).reshape([2, in_features]).astype(dtype)
            found = self(x).astype("float32")
        except (AssertionError, OSError, RuntimeError, ValueError) as error:  # CUDA's own errors come as OSError
            raise InputError(
                f"Paddle's int{self.bits} kernels do not take a weight {[len(weight), in_features]} on this card: "
                "take bfloat16, or --device=cpu"
            ) from error
        right = paddle.matmul(x.astype("float32"), dequantize(weight, scale, in_features), transpose_y=True)
        if not float((found - right).norm()) <= TOLERANCE * float(right.norm()):
            raise InputError(
                f"Paddle's int{self.bits} kernels compute a weight {[len(weight), in_features]} wrongly on this card: "
                "take bfloat16, or --device=cpu"
            )

    def forward(self, x, rows=None):
        """x [..., in] -> [..., out]; `rows`, a slice, takes these outputs alone."""
        out = quant.weight_only_linear(
            x, self.weight, None, self.weight_scale, f"int{self.bits}", group_size=self.group_size
        )
        return out if rows is None else out[..., rows]


def use_weight_only_kernels(model):
    """Put these layers in the place of a quantized language model's own, one after the other."""

    def replace(layer):  # no list of layers: it would keep the first weights of all
        for name in [name for name, part in layer.named_children() if getattr(part, "weight_scale", None) is not None]:
            setattr(layer, name, WeightOnlyLinear(getattr(layer, name), model.dtype))

    model.apply(replace)
