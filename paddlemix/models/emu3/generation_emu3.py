# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Prompts to picture codes, and prompts to text: loops over decoding.py for those who want the whole result.

Every function here works on token ids; text and PIL pictures are the processor's.
"""

from dataclasses import dataclass

from paddlemix.utils import InputError, shown

from .decoding import Batch
from .sampling import GREEDY
from .sequences import Answer, Drawing


@dataclass
class Pictures:
    """What `generate_images` gives: codes, int64 [h, w] a picture, and how many forward passes drew them."""

    codes: list
    forward_passes: int


def make_drawings(
    prompts, sizes, grammar, negative_prompts=None, guidance_scale=3.0, sampling=None, drawn=None
):  # fmt: skip
    """A Drawing for each prompt, as `generate_images` takes them; they are numbered one after the other."""
    prompts = _rows(prompts)
    count = len(prompts)
    negative_prompts = [None] * count if guidance_scale == 1 else negative_prompts
    if not count or count != len(sizes) or negative_prompts is None or len(negative_prompts) != count:
        raise InputError("give a prompt, a size and, for guidance, a negative prompt for each picture")
    if drawn is not None and len(drawn) != count:
        raise InputError(f"drawn must hold the tokens of each picture: {count} pictures, got {len(drawn)}")
    return [
        Drawing(
            prompts[i], sizes[i], grammar, negative_prompts[i], guidance_scale, sampling, i,
            None if drawn is None else drawn[i],
        )
        for i in range(count)
    ]  # fmt: skip


def generate_images(
    model,
    prompts,
    sizes,
    grammar,
    negative_prompts=None,
    guidance_scale=3.0,
    sampling=None,
    decoding="auto",
    window=None,
    drawn=None,
):
    """Draw pictures, several at a time, each of its own size.

    Args:
        model: Emu3ForCausalLM.
        prompts: token ids for each picture, ending with the image token: `input_ids` of Emu3Processor, mode "G", with
            any `return_tensors`. Padding at the ends of a row is left out.
        sizes: (h, w) in codes for each picture: its `image_size`.
        grammar: ImageGrammar.
        negative_prompts: as prompts; what guidance leads away from. Needed unless guidance_scale is 1.
        guidance_scale: 1 is no guidance.
        sampling: Sampling; a picture is a function of prompt, size and (seed, its number in the list).
        decoding, window: as Batch takes them.
        drawn: of each picture int64 [positions], what Drawing.drawn gave: go on from there.

    Returns:
        Pictures.
    """
    drawings = make_drawings(prompts, sizes, grammar, negative_prompts, guidance_scale, sampling, drawn)
    batch = Batch(model, decoding, window)
    batch.join(*drawings)
    while batch:
        batch.step()
    return Pictures([drawing.codes() for drawing in drawings], batch.forward_passes)


def generate_text(model, prompts, max_new_tokens=1024, sampling=GREEDY):
    """Answers, token by token: yields after each step the new ids, None for rows that have ended.

    Args:
        model: Emu3ForCausalLM.
        prompts: token ids for each row; rows may differ in length: `input_ids` of Emu3Processor, mode "U", with any
            `return_tensors`. Padding at the ends of a row is left out.
        max_new_tokens: an end of sequence stops a row earlier.
        sampling: Sampling; greedy where it is left out. An answer is a function of prompt and (seed, its number).

    Yields:
        list of int or None, one a row. The end of sequence itself is not among them.
    """
    prompts = _rows(prompts)
    if not prompts:
        raise InputError("give at least one prompt of at least one token")
    answers = [Answer(prompt, max_new_tokens, model.config, sampling, i) for i, prompt in enumerate(prompts)]
    batch = Batch(model)
    batch.join(*answers)
    while batch:
        gained = dict(batch.step())
        if gained:
            yield [answer.ids[-1] if gained.get(answer) else None for answer in answers]


def _rows(prompts):
    """A list of prompts of a list, an array or a tensor."""
    try:
        return list(prompts)
    except TypeError:
        raise InputError(f"prompts must be rows of token ids, got {shown(prompts)}") from None
