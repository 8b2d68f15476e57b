# Licensed under the Apache License, Version 2.0; see LICENSE.
"""LoRA on a language model: put an adapter beside its linear layers, train it, save it, load it.

The layers compute it in linear.py; its files are in adapter.py. A model for inference takes its adapter while its
weights are read: `from_pretrained(..., lora_path=...)`.
"""

import zlib
from dataclasses import replace

import numpy as np

from paddlemix.paddle_private import to_array
from paddlemix.utils import InputError

from .adapter import PREFIX, Adapter, LoraConfig
from .linear import Emu3Linear


def apply_lora(model, config=None, seed=0):
    """Put a new adapter beside chosen linear layers of an Emu3ForCausalLM, and freeze all else.

    The model computes the same as before: B is zeros. A is uniform in +-1 / sqrt(in), as PEFT draws it, from noise that
    is a function of (seed, name of the layer). Both are float32, whatever the weights are of.

    Args:
        config: LoraConfig; None is its defaults.
        seed: 0 to 2**32 - 1.

    Raises:
        InputError: one of target_modules is of no linear layer; the model has an adapter.
    """
    config, layers = config or LoraConfig(), _linear_layers(model)
    pairs = {}
    for name in config.chosen(layers):
        layer = layers[name]
        noise = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
        bound = 1 / np.sqrt(layer.in_features)
        a = noise.uniform(-bound, bound, [config.rank, layer.in_features]).astype(np.float32)
        pairs[name] = a, np.zeros([layer.weight.shape[0], config.rank], np.float32)
    _put(model, layers, Adapter(config, pairs))


def lora_state(model):
    """{name in PEFT's files: parameter} of a model's adapter; empty where it has none."""
    return {
        f"{PREFIX}{name}.lora_{part}.weight": parameter
        for name, layer in _linear_layers(model).items()
        if layer.lora_A is not None
        for part, parameter in (("A", layer.lora_A), ("B", layer.lora_B))
    }


def save_lora(model, directory, base_model=None):
    """Write a model's adapter as PEFT does: adapter_config.json and adapter_model.safetensors, whole or not at all.

    base_model: the checkpoint that it belongs to, a name of the hub or a directory; PEFT loads it by this name.
    """
    layers = _linear_layers(model)
    pairs = {name: (to_array(x.lora_A), to_array(x.lora_B)) for name, x in layers.items() if x.lora_A is not None}
    if not pairs:
        raise InputError("this model has no LoRA adapter to save: apply_lora puts one in")
    ends = dict.fromkeys(name.rsplit(".", 1)[-1] for name in pairs)
    config = replace(layers[next(iter(pairs))].lora_config, target_modules=tuple(ends))
    if config.chosen(layers) != list(pairs):  # only some layers have it
        config = replace(config, target_modules=tuple(pairs))
    Adapter(config, pairs).write(directory, base_model)


def load_lora(model, name_or_path):
    """Put an adapter in PEFT's layout beside a model's linear layers, and freeze all else, to train it further.

    InputError: there is none, it is damaged or of another model, or the model has one.
    """
    adapter, layers = Adapter.read(name_or_path), _linear_layers(model)
    adapter.check({name: [layer.weight.shape[0], layer.in_features] for name, layer in layers.items()})
    _put(model, layers, adapter)


def _linear_layers(model):
    """{name: Emu3Linear}, without a head that is the embedding."""
    return {
        name: layer
        for name, layer in model.named_sublayers()
        if isinstance(layer, Emu3Linear) and f"{name}.weight" not in model.tied_weights
    }


def _put(model, layers, adapter):
    if any(layer.lora_A is not None for layer in layers.values()):
        raise InputError("this model has a LoRA adapter already: take a new model")
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for name, pair in adapter.pairs.items():
        layers[name].add_lora(*pair, adapter.config)
