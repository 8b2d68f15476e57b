# Licensed under the Apache License, Version 2.0; see LICENSE.
"""AdamW with float32 masters, each process the owner of a part of the weights; learning rates; clipping."""

import math
from functools import partial

import numpy as np
import paddle

from paddlemix.external_ops.square_sum import square_sum
from paddlemix.models.emu3.safetensors_file import SafetensorsFile, write_safetensors
from paddlemix.paddle_private import after_backward, optimize, take_gradient
from paddlemix.utils import InputError, replacing

BETAS, EPSILON = (0.9, 0.95), 1e-6  # the original's
MASTER = "master"
KEPT = {  # Paddle's names of what AdamW keeps of a weight -> those in our files, PyTorch's where it has them
    "moment1_0": "exp_avg", "moment2_0": "exp_avg_sq", "beta1_pow_acc_0": "beta1_pow", "beta2_pow_acc_0": "beta2_pow",
}  # fmt: skip


def cosine_with_min_lr(step, max_steps, warmup_steps, learning_rate, min_learning_rate):
    """The learning rate of a step, counted from 0: a linear warmup, then half a cosine down to the least."""
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    least = min_learning_rate / learning_rate
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return learning_rate * max(0.0, share * (1 - least) + least)


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) for the weights that want a gradient.

    With several processes each one owns a part of the weights (ZeRO, arXiv 1910.02054, stage 2): it alone keeps their
    gradients, summed in float32, their moments and, of weights of 16 bits, float32 masters. A backward pass hands each
    gradient to the owner as soon as it is there. So every process makes the same number of backward passes, and each
    of them reaches all the weights.

    Args:
        weights: {name: parameter}.
        weight_decay: of matrices; norms have none.
        ranks: Ranks.
    """

    def __init__(self, weights, weight_decay, ranks):
        self.weights, self.ranks, self.gradients, self.fault = weights, ranks, {}, None
        self.owners = _owners(weights, ranks.count)
        self.masters = {}
        for name, weight in weights.items():
            after_backward(weight, partial(self._collect, name))
            if self.owners[name] == ranks.rank:
                self.masters[name] = weight if weight.dtype == paddle.float32 else _float32_copy(weight)
        self.names = {master.name: name for name, master in self.masters.items()}
        decayed = {self.masters[name].name for name in self.masters if weights[name].ndim > 1}
        self.adamw = self.masters and paddle.optimizer.AdamW(
            0.0, *BETAS, EPSILON, parameters=list(self.masters.values()), weight_decay=weight_decay,
            apply_decay_param_fun=decayed.__contains__,
        )  # fmt: skip

    def backward(self, loss):
        """A backward pass; its gradients are added to those of the passes before."""
        loss.backward()
        if self.fault:
            raise self.fault

    def _collect(self, name):
        """Hand over a gradient of the backward pass. No error may pass through Paddle's."""
        try:
            if not self.fault:
                self._hand_over(name)
        except Exception as error:
            self.fault = error

    @paddle.no_grad()
    def _hand_over(self, name):
        gradient = take_gradient(self.weights[name]).astype("float32")
        self.ranks.reduce(gradient, self.owners[name])
        if name in self.gradients:
            self.gradients[name].add_(gradient)
        elif name in self.masters:
            self.gradients[name] = gradient

    @paddle.no_grad()
    def step(self, learning_rate, max_norm):
        """Cut the norm of the gradients of all backward passes since the last step to `max_norm`, unless that is 0,
        and change the weights.

        Returns:
            the norm before that, a float; where it is not finite nothing has changed.
        """
        squares = sum(map(square_sum, self.gradients.values()))
        norm = math.sqrt(self.ranks.sum_numbers(squares)[0])
        if math.isfinite(norm) and self.masters:
            scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0  # as torch.nn.utils.clip_grad_norm_
            for gradient in self.gradients.values() if scale < 1 else ():
                gradient.scale_(scale)
            self.adamw.set_lr(learning_rate)
            optimize(self.adamw, [(self.masters[name], gradient) for name, gradient in self.gradients.items()])
        self.gradients = {}
        if math.isfinite(norm):
            self._share()
        return norm

    def _share(self):
        """Every process takes each weight from its owner."""
        for name, weight in self.weights.items():
            if name in self.masters and self.masters[name] is not weight:
                weight.set_value(self.masters[name].astype(weight.dtype))
            self.ranks.broadcast(weight, self.owners[name])

    def save(self, path):
        """What this process keeps, as safetensors: NAME.exp_avg, NAME.exp_avg_sq and so on, and NAME.master."""
        tensors = {}
        for key, tensor in self.adamw.state_dict().items() if self.masters else ():
            owner = next((name for name in self.names if key.startswith(name + "_")), None)
            if owner:
                tensors[f"{self.names[owner]}.{KEPT[key[len(owner) + 1 :]]}"] = tensor
        tensors |= {f"{name}.{MASTER}": m for name, m in self.masters.items() if m is not self.weights[name]}
        with replacing(path) as temporary:
            layout = {name: ("float32", tensor.shape) for name, tensor in tensors.items()}
            write_safetensors(temporary, layout, lambda name: np.asarray(tensors[name].numpy()))

    def load(self, paths):
        """Take what any number of processes have saved. InputError: it is not of these weights."""
        files = [SafetensorsFile(path) for path in paths]
        found = {name: file for file in files for name in file.shapes}

        def read(name, shape):
            if name not in found or math.prod(found[name].shapes[name]) != math.prod(shape):
                raise InputError(f"there is no optimizer's state of {name} {list(shape)}")
            return paddle.to_tensor(found[name].read(name, np.float32).reshape(shape))

        state = {}
        for name, master in self.masters.items():
            if master is not self.weights[name]:
                master.set_value(read(f"{name}.{MASTER}", master.shape))
            for key, kept in KEPT.items():
                shape = [1] if kept.endswith("_pow") else master.shape
                state[f"{master.name}_{key}"] = read(f"{name}.{kept}", shape)
        if state:
            self.adamw.set_state_dict(state)
        for file in files:
            file.close()


def _owners(weights, count):
    """{name: the process that owns it}, so that each has about as many numbers."""
    sizes, owners = [0] * count, {}
    for name in sorted(weights, key=lambda name: (-weights[name].size, name)):
        owners[name] = sizes.index(min(sizes))
        sizes[owners[name]] += weights[name].size
    return owners


def _float32_copy(weight):
    copy = paddle.create_parameter(weight.shape, "float32", default_initializer=paddle.nn.initializer.Constant(0.0))
    copy.set_value(weight.astype("float32"))
    return copy
