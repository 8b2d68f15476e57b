# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The index of the nearest codeword, without a [positions, codebook] matrix of a whole picture."""

import paddle

from paddlemix.utils import InputError

from .. import operators_for

CHUNK = 1024  # positions a time without the operator
MOST_DIM = 32  # of the operator on a GPU: a latent is held in registers


def nearest_codeword(latents, codebook):
    """By the distance |latent|^2 + |codeword|^2 - 2 latent codeword in the latents' dtype; of equal ones the first.

    Args:
        latents: floating [n, dim].
        codebook: [size, dim], the same dtype.

    Returns:
        int64 [n], without gradient.
    """
    if latents.ndim != 2 or codebook.ndim != 2 or latents.shape[1] != codebook.shape[1] or 0 in codebook.shape:
        raise InputError(
            f"latents must be [n, dim] and codebook [size, dim], got {list(latents.shape)} and {list(codebook.shape)}"
        )
    if latents.dtype != codebook.dtype:
        raise InputError(f"latents and codebook must have one dtype, got {latents.dtype} and {codebook.dtype}")
    with paddle.no_grad():
        squares = (codebook * codebook).sum(axis=1)
        latent_squares = (latents * latents).sum(axis=1)
        fits = latents.place.is_cpu_place() or latents.shape[1] <= MOST_DIM
        if fits and latents.dtype == paddle.float32 and (ops := operators_for(latents, codebook)):
            return ops.nearest_codeword(latents, latent_squares, codebook.t(), squares)
        codes = []
        for start in range(0, latents.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            distances = latent_squares[rows].unsqueeze(-1) + squares
            distances -= 2 * paddle.matmul(latents[rows], codebook, transpose_y=True)
            codes.append(distances.argmin(axis=1))
        return paddle.concat(codes) if codes else paddle.zeros([0], dtype="int64")
