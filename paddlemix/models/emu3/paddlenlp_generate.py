# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What PaddleNLP's `generate` asks of a model: greedy search, sampling and beams over left-padded batches.

PaddleNLP takes three seconds to import: it is imported when `generate` is first called, which no command does.
"""

import functools

import paddle

from paddlemix.paddle_private import logits_processors as processors_of
from paddlemix.utils import InputError

from .attention import allowed_keys


def is_ids(x):
    """Whether it is a tensor that an embedding takes."""
    return paddle.is_tensor(x) and x.dtype in (paddle.int64, paddle.int32)


def kind_of(x):
    """Of what is not a tensor of ids, for a message."""
    return f"{type(x).__name__} of {x.dtype} {list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__


class PaddleNLPGenerate:
    """But for `generate` its methods are called by `generate` alone. The model gives `config` and `make_cache`."""

    @property
    def generation_config(self):
        """PaddleNLP's GenerationConfig: the token ids that `generate` stops at and pads with."""
        if "_generation_config" not in self.__dict__:
            from paddlenlp.generation import GenerationConfig

            names = "pad_token_id", "bos_token_id", "eos_token_id"
            self._generation_config = GenerationConfig(**{name: getattr(self.config, name) for name in names})
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value):
        self._generation_config = value

    def generate(self, input_ids=None, *args, **options):
        """PaddleNLP's `generate`, which see.

        Raises:
            InputError: input_ids are not int64 [batch, length], or padded on the right, where what is generated would
                follow the padding.
        """
        advice = 'take those of Emu3Processor with padding="longest", padding_side="left" and return_tensors="pd"'
        mask = options.get("attention_mask")
        if input_ids is not None and not (is_ids(input_ids) and input_ids.ndim == 2 and input_ids.shape[1]):
            raise InputError(
                f"generate takes left-padded input_ids, a Paddle tensor int64 [batch, length], got {kind_of(input_ids)}"
                f": {advice}"
            )
        if mask is not None and not paddle.is_tensor(mask):
            raise InputError(f"generate takes attention_mask as a Paddle tensor, got {kind_of(mask)}: {advice}")
        if input_ids is not None:
            length = input_ids.shape[1]
            if mask is not None and mask.shape[-1] != length:
                raise InputError(f"the attention_mask must be as long as the {length} ids, got {mask.shape}: {advice}")
            low, high, size = int(input_ids.min()), int(input_ids.max()), self.config.vocab_size
            if low < 0 or high >= size:
                raise InputError(f"generate takes ids from 0 to {size - 1}, got {low} to {high}")
            input_ids = input_ids.astype("int64")
            is_own = input_ids != self.config.pad_token_id if mask is None else _padding_mask(mask).astype("bool")
            if not bool(is_own[:, -1].all()):
                raise InputError(f"generate takes prompts that are padded on the left, not on the right: {advice}")
        return _generation()(self).generate(input_ids, *args, **options)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, use_cache=True, **kwargs
    ):
        if kwargs.get("inputs_embeds") is not None:
            raise InputError("generate takes input_ids and no inputs_embeds: pictures are token ids, too")
        past = 0
        if use_cache:
            past_key_values = past_key_values or self.make_cache(input_ids.shape[0], input_ids.shape[1] + 64)
            past = past_key_values.length
        if attention_mask is not None:
            attention_mask = _padding_mask(attention_mask)
            attention_mask = None if bool(attention_mask.all()) else attention_mask
        return {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "position_ids": None if position_ids is None else position_ids[:, past:],
            "past_key_values": past_key_values if use_cache else None,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    @staticmethod
    def update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False):
        model_kwargs["past_key_values"] = outputs.past_key_values
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            mask = _padding_mask(mask)
            model_kwargs["attention_mask"] = paddle.concat([mask, paddle.ones_like(mask[:, :1])], axis=-1)
        positions = model_kwargs.get("position_ids")
        if positions is not None:
            model_kwargs["position_ids"] = paddle.concat([positions, positions[:, -1:] + 1], axis=-1)
        return model_kwargs

    def reorder_cache(self, cache, beam_idx):
        return None if cache is None else cache.map(lambda x: x.index_select(beam_idx))


@functools.cache
def _generation():
    """The class of PaddleNLP's searches over a model."""
    from paddlenlp.generation import GenerationMixin

    class Generation(GenerationMixin):
        def __init__(self, model):
            self.model, self.config, self.generation_config = model, model.config, model.generation_config
            self.prepare_inputs_for_generation = model.prepare_inputs_for_generation
            self.update_model_kwargs_for_generation = model.update_model_kwargs_for_generation
            self.reorder_cache = model.reorder_cache

        def __call__(self, **inputs):
            return self.model(**inputs)

        def get_logits_processor(self, logits_processors=None, **kwargs):
            # PaddleNLP 3.0.0b3 iterates over what is given here, which cannot be iterated
            processors = super().get_logits_processor(**kwargs)
            for processor in () if logits_processors is None else processors_of(logits_processors):
                processors.append(processor)
            return processors

    return Generation


def _padding_mask(mask):
    """PaddleNLP's masks of four axes, too, as int64 [batch, length]: what the last token may see."""
    length = mask.shape[-1]
    batch, new = mask.shape[0], mask.shape[2] if mask.ndim == 4 else 1
    return allowed_keys(mask, batch, new, length)[:, 0, -1].astype("int64")
