# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pieces for those who drive PaddleNLP's `generate` themselves; `generate_images` needs none of them.

What each gives depends on its arguments alone, so that one object serves many calls.
"""

import paddle
from paddlenlp.generation import LogitsProcessor, StoppingCriteria

from paddlemix.utils import InputError, whole_numbers

from .image_grammar import ImageGrammar
from .sampling import check_guidance_scale


class Emu3PrefixConstrainedLogitsHelper:
    """The ids that may come next in a picture, for PaddleNLP's PrefixConstrainedLogitsProcessor.

    Args:
        height, width: codes of the pictures, int64 [batch], or [1] for all.
        img_token ... pad_token: ids. visual_tokens: list of ids.
    """

    def __init__(self, height, width, img_token, eoi_token, eos_token, eol_token, eof_token, pad_token, visual_tokens):
        self.height, self.width = (
            whole_numbers(name, sides, 1).ravel().tolist() for name, sides in (("height", height), ("width", width))
        )
        self.visual_tokens = visual_tokens
        self.grammar = ImageGrammar(
            img=img_token, boi=None, eoi=eoi_token, eol=eol_token, eof=eof_token, eos=eos_token, pad=pad_token,
            first_visual=visual_tokens[0], codebook_size=len(visual_tokens),
        )  # fmt: skip

    def __call__(self, batch_id, input_ids):
        """input_ids: int64 [length] -> list of ids that may follow."""
        position = int(input_ids.shape[0]) - 1 - _last(input_ids, self.grammar.img)
        height = self.height[batch_id if len(self.height) > 1 else 0]
        width = self.width[batch_id if len(self.width) > 1 else 0]
        forced = self.grammar.forced(height, width, position)
        return self.visual_tokens if forced is None else [forced]


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Classifier-free guidance (Sanchez et al., arXiv 2306.17806) on log-probabilities.

    They become scale * (conditional - unconditional) + unconditional. The unconditional branch is
    `unconditional_ids` followed by what has been drawn since the last image token.

    Args:
        guidance_scale: 1 is no guidance.
        model: Emu3ForCausalLM.
        unconditional_ids: int64 [batch, length], prompts that end with the image token.
        unconditional_attention_mask: [batch, length]; where left out, padding ids on the left are masked.
        use_cache: False recomputes the whole branch each step.
    """

    def __init__(self, guidance_scale, model, unconditional_ids, unconditional_attention_mask=None, use_cache=True):
        self.guidance_scale = check_guidance_scale(guidance_scale)
        self.model, self.use_cache = model, use_cache
        self.unconditional_ids = unconditional_ids
        if unconditional_attention_mask is None:
            unconditional_attention_mask = (unconditional_ids != model.config.pad_token_id).astype("int64")
        self.unconditional_attention_mask = unconditional_attention_mask
        self._memo = (None, None)  # ids seen and their cache: saves work, changes no result

    def __call__(self, input_ids, scores):
        scores = _log_softmax(scores)
        if self.guidance_scale == 1:
            return scores
        unconditional = _log_softmax(self._unconditional_logits(input_ids))
        return self.guidance_scale * (scores - unconditional) + unconditional

    @paddle.no_grad()
    def _unconditional_logits(self, input_ids):
        drawn = input_ids[:, _last(input_ids[0], self.model.config.img_token_id) + 1 :]
        ids = paddle.concat([self.unconditional_ids, drawn], axis=1)
        mask = paddle.concat([self.unconditional_attention_mask, paddle.ones_like(drawn)], axis=1)
        inputs = self.model.prepare_inputs_for_generation(ids, self._cache_of(ids), mask, use_cache=self.use_cache)
        output = self.model(**inputs)
        self._memo = (ids, output.past_key_values)
        return output.logits[:, -1]

    def _cache_of(self, ids):
        """The cache of the last call where it holds a true beginning of `ids`."""
        seen, cache = self._memo
        if cache is None or seen.shape[0] != ids.shape[0] or not cache.length < ids.shape[1]:
            return None
        return cache if bool((ids[:, : seen.shape[1]] == seen).all()) else None


class EosTokenCriteria(StoppingCriteria):
    """Stop when every row's last token is an end of sequence, or the padding that follows one.

    Args:
        eos_token_id: an id, or a list of them.
        pad_token_id: what finished rows of a batch are filled with.
    """

    def __init__(self, eos_token_id, pad_token_id=None):
        ids = eos_token_id.tolist() if isinstance(eos_token_id, paddle.Tensor) else eos_token_id
        self.ends = set(ids if isinstance(ids, list) else [ids]) | {pad_token_id}

    def __call__(self, input_ids, scores, **kwargs):
        return all(last in self.ends for last in input_ids[:, -1].tolist())


def _log_softmax(scores):
    # Paddle's own takes half a minute for 184,622 classes on a CPU
    scores = scores.astype("float32")
    return scores - paddle.logsumexp(scores, axis=-1, keepdim=True)


def _last(input_ids, token):
    positions = (input_ids == token).nonzero()
    if positions.shape[0] == 0:
        raise InputError(f"the prompt has no image token {token}: make it with Emu3Processor, mode='G'")
    return positions[-1].item()
