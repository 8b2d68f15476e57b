# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The names of Paddle and PaddleNLP that their documentation does not promise: a new release is tried against these.

Paddle is imported where it is used: a command's `--help` does not wait for it.
"""

import contextlib


def set_num_threads(count):
    """How many threads Paddle computes with on a CPU from now on."""
    import paddle

    paddle.base.core.set_num_threads(count)


def num_threads():
    """How many threads Paddle computes with on a CPU; None where it does not bring its own OpenMP."""
    import ctypes
    from pathlib import Path

    import paddle

    library = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
    return ctypes.CDLL(str(library)).omp_get_max_threads() if library.exists() else None


def free_card_memory():
    """Bytes that the card in use has free, of all programs together."""
    import paddle

    return paddle.base.core.gpu_memory_available()


def record_cuda_graph(function):
    """What `function` launches on the card in use, recorded and not computed: a graph with replay() and reset()."""
    import paddle
    from paddle.device.cuda.graphs import CUDAGraph

    graph = CUDAGraph(paddle.CUDAPlace(int(paddle.get_device().split(":")[1])))  # left out, it is the first card
    paddle.device.synchronize()
    graph.capture_begin()
    try:
        function()
    finally:
        graph.capture_end()
    return graph


def use_full_float32():
    """Let a card compute float32 convolutions and products in float32, not in TF32 with 10 bits of fraction."""
    import paddle

    with contextlib.suppress(ValueError):  # there is no such flag before 3.3
        paddle.set_flags({"FLAGS_cudnn_allow_tf32": False})
    paddle.base.core.set_cudnn_switch(False)  # for the way of cuDNN that the flag does not reach
    paddle.base.core.set_cublas_switch(False)  # for products, which were of TF32 before 3.3


def is_untouched(layer):
    """Whether a layer is not in training, and nothing is hooked in or put in the place of its forward."""
    hooked = layer._forward_pre_hooks or layer._forward_post_hooks or "forward" in vars(layer)
    return not layer.training and not hooked


def after_backward(parameter, function):
    """Call `function` in every backward pass as soon as the parameter's gradient is whole."""
    parameter._register_backward_hook(lambda *_: function())


def take_gradient(parameter):
    """The gradient of a parameter, which has none after that. Not a copy, which a reference to it would need to be:
    clearing a gradient frees its memory, whoever refers to it."""
    import paddle

    gradient = paddle.empty_like(parameter.grad)
    parameter.grad._share_buffer_to(gradient)
    parameter.clear_gradient(False)
    return gradient


def optimize(optimizer, pairs):
    """A step of an optimizer with (parameter, gradient) pairs. To set a parameter's `grad` would copy it."""
    optimizer._apply_optimize(loss=None, startup_program=None, params_grads=pairs)


def is_parameter(tensor):
    import paddle

    return isinstance(tensor, paddle.base.framework.EagerParamBase)


def share(array, parameter):
    """Let a parameter take the memory of a numpy array, on a card a copy of it."""
    import paddle

    tensor, device = to_tensor(array), paddle.get_device()
    (tensor if device == "cpu" else tensor.to(device))._share_underline_tensor_to(parameter)


def to_tensor(array):
    """A tensor on the CPU that shares a numpy array's memory; dlpack knows no bfloat16, so that goes as integers.

    Every tensor that Paddle 3.3.1 makes of something, also in from_dlpack and to_tensor, leaves a list behind for good;
    one that an operator makes does not.
    """
    import numpy as np
    import paddle

    if array.dtype == "bfloat16":
        return to_tensor(array.view(np.int16)).view("bfloat16")
    tensor = paddle._C_ops.empty([0], paddle.float32, paddle.CPUPlace())
    tensor.get_tensor()._share_data_with(paddle.base.core.from_dlpack(array.__dlpack__()))
    return tensor


def to_array(tensor):
    """A numpy array; Paddle gives bfloat16 as the integers it is stored as."""
    import ml_dtypes

    array = tensor.detach().cpu().numpy()
    return array.view(ml_dtypes.bfloat16) if array.dtype == "uint16" else array


def convolution_settings(conv):
    """(stride, padding, padding mode, dilation, groups, data format) of a paddle.nn.Conv2D."""
    return conv._stride, conv._padding, conv._padding_mode, conv._dilation, conv._groups, conv._data_format


def group_norm_settings(norm):
    """(groups, epsilon) of a paddle.nn.GroupNorm."""
    return norm._num_groups, norm._epsilon


def logits_processors(processors):
    """PaddleNLP 3.0.0b3's LogitsProcessorList cannot be iterated over."""
    return processors._processors.values()
