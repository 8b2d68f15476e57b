# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The linear layer of the language model: float32, 16 bits, int8 and int4."""

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.external_ops.few_rows_linear import GROUP, few_rows_linear, quantize
from paddlemix.paddle_private import share, to_tensor
from paddlemix.utils import InputError

from .configuration_emu3 import QUANTIZATIONS
from .parallel import Part


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

    Args:
        rows: of tensor parallel the outputs that this process has, slices that follow each other; None is all.
        columns: the inputs that it has, a slice; None is all. What comes out is then summed over the processes.
        ranks: TensorParallel; None is one process.
    """

    def __init__(self, config, in_features, out_features, rows=None, columns=None, ranks=None):
        super().__init__()
        self.shape, self.rows, self.columns = [out_features, in_features], rows, columns  # of the whole
        self.ranks = ranks if columns else None
        if rows:
            out_features = sum(part.stop - part.start for part in rows)
        if columns:
            in_features = columns.stop - columns.start
        self.in_features, self.quantized_dtype = in_features, config.quantized_dtype
        dtype, shape, scales, self.weight_scale = "float32", [out_features, in_features], None, None
        if self.quantized_dtype == "int8":
            dtype, scales = "int8", [out_features]
        elif self.quantized_dtype == "int4":
            size = config.quantization_config["group_size"]
            if columns and columns.start % size:
                raise InputError(
                    f"int4 has a scale for each {size} inputs, and {ranks.count} processes would divide those of a "
                    f"layer at {columns.start}: take int8, or another number of processes"
                )
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
        y = y if self.lora_A is None else y + self._lora(x, rows).astype(y.dtype)
        return y if self.ranks is None else self.ranks.sum(y)

    def parts(self):
        """{name of a weight: the Part of the checkpoint's that it is}"""
        if not self.rows and not self.columns:
            return {}
        (outputs, inputs), columns = self.shape, self.columns
        if self.quantized_dtype == "int8":
            return {"weight": Part(self.shape, self.rows, columns), "weight_scale": Part([outputs], self.rows)}
        if self.quantized_dtype == "int4":
            groups = math.ceil(inputs / GROUP)
            columns = columns and slice(columns.start // GROUP, math.ceil(columns.stop / GROUP))
            codes = columns and slice(columns.start * GROUP // 2, columns.stop * GROUP // 2)
            return {
                "weight": Part([outputs, groups * GROUP // 2], self.rows, codes),
                "weight_scale": Part([outputs, groups], self.rows, columns),
            }
        return {"weight": Part(self.shape, self.rows, columns)}

    def add_lora(self, a, b, config):
        """Put a LoRA adapter beside the weight, which gets no gradient from now on.

        Args:
            a, b: float32 arrays [rank, in] and [out, rank], of the whole layer.
            config: its LoraConfig.
        """
        a = np.ascontiguousarray(a[:, self.columns]) if self.columns else a
        b = np.concatenate([b[rows] for rows in self.rows]) if self.rows else b
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
        bits, columns = QUANTIZATIONS[self.quantized_dtype]["bits"], self.shape[1]
        # the scale of int8 is of the whole row, also where this process has some of its columns
        of_whole_rows = bits == 8 and self.columns
        part = Part(self.shape, self.rows, None if of_whole_rows else self.columns)
        arrays, first = None, 0
        for chunk in file.chunks(name, np.dtype("float32"), columns, on_bytes, part):
            rows = chunk.reshape([-1, columns if of_whole_rows else self.in_features])
            rows = rows.astype(np.float32) if rows.dtype == np.float64 else np.array(rows)  # not the file's map
            pieces = [tensor.numpy() for tensor in quantize(to_tensor(rows), bits)]
            if of_whole_rows:
                pieces[0] = pieces[0][:, self.columns]
            arrays = arrays or [np.empty([self.weight.shape[0], *x.shape[1:]], x.dtype) for x in pieces]
            for array, piece in zip(arrays, pieces, strict=True):
                array[first : first + len(piece)] = piece
            first += len(rows)
        for array, parameter in zip(arrays, (self.weight, self.weight_scale), strict=True):
            share(array, parameter)


class SplitHead(Emu3Linear):
    """The linear layer to logits where several processes have it: of the texts' rows each has a part, and of the visual
    ones, which are the last, so that a picture's pass is divided evenly."""

    def __init__(self, config, ranks):
        first, vocab = config.eoi_token_id + 1, config.vocab_size
        self.blocks = [slice(0, first), slice(first, vocab)] if first < vocab else [slice(0, vocab)]
        self.sizes = [-(-(block.stop - block.start) // ranks.count) for block in self.blocks]  # a process has
        self.firsts = [
            [min(block.start + rank * size, block.stop - size) for rank in range(ranks.count)]
            for block, size in zip(self.blocks, self.sizes, strict=True)
        ]
        rows = tuple(slice(f[ranks.rank], f[ranks.rank] + n) for f, n in zip(self.firsts, self.sizes, strict=True))
        super().__init__(config, config.hidden_size, vocab, rows=rows)
        self.all_ranks = ranks

    def forward(self, x, rows=None):
        """As Emu3Linear's, gathered from all processes: the same bits in each."""
        start, stop, _ = (rows or slice(None)).indices(self.shape[0])
        blocks = [i for i, block in enumerate(self.blocks) if block.start < stop and start < block.stop]
        own = slice(sum(self.sizes[: blocks[0]]), sum(self.sizes[: blocks[-1] + 1]))
        gathered = self.all_ranks.gather_tensors(super().forward(x, own))
        logits, place = [], 0
        for i in blocks:
            end = self.blocks[i].start
            for first, part in zip(self.firsts[i], gathered, strict=True):  # two may have a row at a block's end
                logits.append(part[..., place + end - first : place + self.sizes[i]])
                end = max(end, first + self.sizes[i])
            place += self.sizes[i]
        logits, first = paddle.concat(logits, axis=-1), self.blocks[blocks[0]].start
        return logits[..., start - first : stop - first]


def normal(config):
    """What float weights start from when no checkpoint is read."""
    return nn.initializer.Normal(0.0, config.initializer_range)
