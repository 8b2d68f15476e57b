# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Prompts of both modes and decoded documents, against the original's."""

import numpy as np
import paddle
import pytest
from conftest import golden
from PIL import Image

from paddlemix.models.emu3 import Emu3Tokenizer
from paddlemix.models.emu3.image_grammar import ImageGrammar
from paddlemix.processors import Emu3Processor, Emu3VisionVQImageProcessor
from paddlemix.processors.emu3_processing import generate_size, largest_size

DATA = golden("processor.npz")
IMAGES = [Image.fromarray(DATA[f"image{i}"]) for i in range(3)]


@pytest.fixture(scope="module")
def processor(vocabulary_dir, vision_model):
    image_processor = Emu3VisionVQImageProcessor(min_pixels=64 * 64, max_pixels=112 * 112)
    return Emu3Processor(image_processor, vision_model, Emu3Tokenizer.from_pretrained(vocabulary_dir))


def same(batch, name):
    np.testing.assert_array_equal(batch.input_ids, DATA[f"{name}_ids"])
    np.testing.assert_array_equal(batch.attention_mask, DATA[f"{name}_mask"])
    np.testing.assert_array_equal(batch.image_size, DATA[f"{name}_size"])
