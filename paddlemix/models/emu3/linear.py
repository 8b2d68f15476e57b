# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The linear layer of the language model: float32, 16 bits, int8 and int4."""

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.external_ops.few_rows_linear import few_rows_linear, quantize
from paddlemix.paddle_private import share, to_tensor

from .configuration_emu3 import QUANTIZATIONS


def linear(x, weight, scale=None):
    """x [..., in] times weight [out, in] -> [..., out]. The weight may be of fewer bits than x: int8 or int4 with its
    scale, and on a CPU bfloat16, as few_rows_linear takes them."""
    if scale is not None or (x.place.is_cpu_place() and x.dtype == paddle.float32):
        return few_rows_linear(x, weight, scale)
    return paddle.matmul(x, weight, transpose_y=True)


class Emu3Linear(nn.Layer):
    """A linear layer without bias whose weight is [out, in], as in the checkpoint.

    Where config.quantization_config says so, it is int8 with a scale for each output, or int4 with a scale for each
    output and group of inputs, two in a byte (few_rows_linear tells the order). `add_lora` puts an adapter beside it.
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
        self.lora_A = self.lora_B = None

    def forward(self, x, rows=None):
        """x [..., in] -> [..., out]; `rows`, a slice, takes these outputs alone."""
        weight, scale = self.weight, self.weight_scale
        if rows is not None:
            weight, scale = weight[rows], None if scale is None else scale[rows]
        y = linear(x, weight, scale)
        return y if self.lora_A is None else y + self._lora(x, rows).astype(y.dtype)

    def add_lora(self, a, b, config):
        """Put a LoRA adapter beside the weight, which gets no gradient from now on.

        Args:
            a, b: float32 arrays [rank, in] and [out, rank].
            config: its LoraConfig.
        """
        self.weight.stop_gradient = True
        self.lora_config = config
        self.lora_A, self.lora_B = (
            self.create_parameter(list(x.shape), default_initializer=nn.initializer.Assign(x)) for x in (a, b)
        )

    def _lora(self, x, rows):
        """In float32, whatever the weight is of."""
        x = F.dropout(x.astype("float32"), self.lora_config.dropout, training=self.training)
        b = self.lora_B if rows is None else self.lora_B[rows]
        return linear(linear(x, self.lora_A), b) * self.lora_config.scale

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
