# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a training run is asked for."""

import json
from dataclasses import dataclass, field, fields

from paddlemix.utils import InputError, real_number, whole_number

LOSS_ON = {(True, False): "vision", (False, True): "text", (False, False): "all"}  # by the original's two options


def setting(default, help, least=None, most=None, choices=None):
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Names and values are the original's where it has them.

    Raises:
        InputError: values that cannot be.
    """

    model_path: str = setting(None, "what to train: a directory, a hub name, or emu3-mini")
    data_path: tuple = setting((), "what `emu3 prepare` wrote: folders, or Parquet files")
    output_dir: str = setting(None, "for checkpoints, log.jsonl and curves.png; what is there is gone on with")
    max_steps: int = setting(0, "how long to train; 0: as --num_train_epochs says", 0)
    num_train_epochs: float = setting(4.0, "how often each row is seen", 0, 1e6)
    per_device_train_batch_size: int = setting(1, "rows in memory at once, in each process", 1)
    gradient_accumulation_steps: int = setting(8, "so many times as many rows make a step", 1)
    learning_rate: float = setting(1e-5, "after the warmup", 0, 1)
    min_learning_rate: float = setting(1e-6, "at the end of the cosine", 0, 1)
    warmup_steps: int = setting(30, "in which the learning rate grows from 0", 0)
    weight_decay: float = setting(0.1, "of matrices", 0, 10)
    max_grad_norm: float = setting(5.0, "a longer gradient is cut to it; 0: none is", 0, 1e9)
    null_prompt_prob: float = setting(0.05, "how often a drawing's text is left away, for guidance", 0, 1)
    apply_loss_on_only_vision: bool = setting(True, "of drawings, learn the visual tokens; False: all tokens")
    apply_loss_on_only_text: bool = setting(False, "of drawings, learn the text instead")
    add_eos: bool = setting(False, "end drawings with an end of sequence, and learn it")
    image_area: int = setting(0, "of samples, and for the new config.json, which an adapter lacks; 0: the model's", 0)
    max_position_embeddings: int = setting(0, "tokens of a row at most, likewise; 0: the model's", 0)
    dtype: str = setting(
        None,
        "of the weights; 16 bits have float32 masters in the optimizer, int8 and int4 are for --lora (default: "
        "bfloat16 on a card, else float32; of a quantized checkpoint, its own)",
        choices=("float32", "bfloat16", "int8", "int4"),
    )
    recompute: bool = setting(False, "compute activations again in the backward pass: far less memory, more time")
    lora: bool = setting(False, "train low-rank adapters, and leave the model as it is")
    lora_rank: int = setting(8, "of the adapters", 1)
    lora_alpha: float = setting(16.0, "the adapters count alpha / rank times", 1e-6, 1e6)
    lora_dropout: float = setting(0.0, "of what the adapters see", 0, 0.999)
    lora_target_modules: tuple = setting((), "names of the linear layers that get one (default: q_proj k_proj v_proj "
                                         "o_proj gate_proj up_proj down_proj)")  # fmt: skip
    save_steps: int = setting(500, "between two checkpoints", 1)
    save_total_limit: int = setting(10, "so many checkpoints are kept; 0: all", 0)
    eval_rows: int = setting(0, "rows that are held out, for the loss of what is not trained", 0)
    eval_steps: int = setting(100, "between two such losses, and between two samples", 1)
    sample_prompt: tuple = setting((), "texts to draw at every evaluation, into OUTPUT_DIR/samples")
    vq_model_path: str = setting(None, "the vision tokenizer, which samples take (default: as emu3 generate has it)")
    seed: int = setting(42, "of the order of the rows, of what is left away, of the adapters", 0)

    def __post_init__(self):
        for one in fields(self):
            value, least, most = getattr(self, one.name), one.metadata["least"], one.metadata["most"]
            if type(one.default) is int:
                value = whole_number(one.name, value, f"a whole number, {least} or more", least)
            elif type(one.default) is float:
                value = real_number(one.name, value, f"a number from {least:g} to {most:g}", least, most)
            elif one.default == ():
                value = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, one.name, value)
        if not (self.model_path and self.data_path and self.output_dir):
            raise InputError("give model_path, data_path and output_dir")
        if not 0 < self.learning_rate >= self.min_learning_rate:
            raise InputError(
                f"learning_rate must be above 0 and not below min_learning_rate, got {self.learning_rate:g} and "
                f"{self.min_learning_rate:g}"
            )
        if (self.apply_loss_on_only_vision, self.apply_loss_on_only_text) not in LOSS_ON:
            raise InputError(
                "apply_loss_on_only_vision and apply_loss_on_only_text are both on: turn one of them off (False)"
            )
        if not self.max_steps and not self.num_train_epochs:
            raise InputError("max_steps and num_train_epochs are 0: give one of them")
        if self.lora:
            _ = self.lora_config  # which refuses what cannot be
        for one in () if self.lora else fields(self):
            if one.name.startswith("lora_") and getattr(self, one.name) != one.default:
                raise InputError(f"{one.name} is of adapters: add --lora, or leave it out to train all weights")
        if self.dtype in ("int8", "int4") and not self.lora:
            raise InputError(f"{self.dtype} weights cannot be trained: add --lora, or take float32 or bfloat16")

    @property
    def loss_on(self):
        return LOSS_ON[self.apply_loss_on_only_vision, self.apply_loss_on_only_text]

    @property
    def lora_config(self):
        from paddlemix.models.emu3.adapter import PROJECTIONS, LoraConfig

        targets = self.lora_target_modules
        targets = targets[0] if targets in (("all-linear",),) else targets or PROJECTIONS
        return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, targets)

    def job(self, rows, rows_of_step, digest):
        """What decides the numbers of a run: a checkpoint of other values is not gone on with."""
        free = ("output_dir", "data_path", "save_steps", "save_total_limit", "eval_steps", "sample_prompt", "recompute",
                "vq_model_path", "per_device_train_batch_size", "gradient_accumulation_steps")  # fmt: skip
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in free}
        values |= {"rows of the data": rows, "rows of a step": rows_of_step, "digest of the data": f"{digest:08x}"}
        return json.loads(json.dumps(values))
