# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The linear layer of the language model: float32, 16 bits, int8, int4, and the weight-only kernels of a card."""

import math

import numpy as np
import paddle
from paddle import nn
from paddle.nn import quant

from paddlemix.external_ops.few_rows_linear import GROUP, dequantize, few_rows_linear, quantize
from paddlemix.paddle_private import share, to_tensor
from paddlemix.utils import InputError

from .configuration_emu3 import QUANTIZATIONS

TOLERANCE = 0.02  # 16 bits and their sums err by less; wrongly laid out weights err by more than 1


def linear(x, weight, scale=None):
    """x [..., in] times weight [out, in] -> [..., out]. On a CPU the weight may be of fewer bits than x: bfloat16, or
    int8 or int4 with its scale, as few_rows_linear takes them."""
    if x.place.is_cpu_place() and x.dtype == paddle.float32:
        return few_rows_linear(x, weight, scale)
    return paddle.matmul(x, weight, transpose_y=True)


class Emu3Linear(nn.Layer):
    """A linear layer without bias whose weight is [out, in], as in the checkpoint.

    Where config.quantization_config says so, it is int8 with a scale for each output, or int4 with a scale for each
    output and group of inputs, two in a byte (few_rows_linear tells the order). On a GPU from_pretrained puts a
    WeightOnlyLinear in its place then.
    """

    def __init__(self, config, in_features, out_features):
        super().__init__()
        self.in_features, self.quantized_dtype = in_features, config.quantized_dtype
        dtype, shape, scales, self.weight_scale = "float32", [out_features, in_features], None, None
        if self.quantized_dtype == "int8":
            dtype, scales = "int8", [out_features]
        elif self.quantized_dtype == "int4":
            size = config.quantization_config["group_size"]
            groups = math.ceil(in_features / size)
            dtype, shape, scales = "uint8", [out_features, groups * size // 2], [out_features, groups]
        initializer = normal(config) if scales is None else nn.initializer.Constant(0)
        self.weight = self.create_parameter(shape, dtype=dtype, default_initializer=initializer)
        if scales:
            self.weight_scale = self.create_parameter(scales, dtype="float32", default_initializer=initializer)
            self.weight.stop_gradient = self.weight_scale.stop_gradient = True

    def forward(self, x, rows=None):
        """x [..., in] -> [..., out]; `rows`, a slice, takes these outputs alone."""
        weight, scale = self.weight, self.weight_scale
        if rows is not None:
            weight, scale = weight[rows], None if scale is None else scale[rows]
        return linear(x, weight, scale)

    def quantize_from(self, file, name, on_bytes):
        """Take the float tensor [out, in] of a SafetensorsFile, quantized some rows at a time while it is read."""
        bits, columns = QUANTIZATIONS[self.quantized_dtype]["bits"], self.in_features
        arrays = None
        for first, chunk in file.chunks(name, np.dtype("float32"), columns, on_bytes):
            rows = chunk.reshape([-1, columns])
            rows = rows.astype(np.float32) if rows.dtype == np.float64 else np.array(rows)  # not the file's map
            parts = [tensor.numpy() for tensor in quantize(to_tensor(rows), bits)]
            arrays = arrays or [np.empty([self.weight.shape[0], *part.shape[1:]], part.dtype) for part in parts]
            for array, part in zip(arrays, parts, strict=True):
                array[first // columns : first // columns + len(part)] = part
        for array, parameter in zip(arrays, (self.weight, self.weight_scale), strict=True):
            share(array, parameter)


def normal(config):
    """What float weights start from when no checkpoint is read."""
    return nn.initializer.Normal(0.0, config.initializer_range)


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
                "take bfloat16, or the device cpu"
            ) from error
        right = paddle.matmul(x.astype("float32"), dequantize(weight, scale, in_features), transpose_y=True)
        if not float((found - right).norm()) <= TOLERANCE * float(right.norm()):
            raise InputError(
                f"Paddle's int{self.bits} kernels compute a weight {[len(weight), in_features]} wrongly on this card: "
                "take bfloat16, or the device cpu"
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
