# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model of a command: the arguments that name it, its dtype, loading it."""

from paddlemix.utils import InputError

from .console import note
from .files import ROOT
from .needs import step_parameters

# Without the compiled operators Paddle computes in float32 on a CPU. A model that reads less for a token is quick
# enough without them, and no note is due.
SLOW_BYTES = 100e6


def add_dtype(parser):
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16", "int8", "int4"],
        help="of the language model: int8 and int4 quantize its linear layers while they are read "
        "(default: bfloat16; of a quantized checkpoint, its own)",
    )


def add_model_paths(parser, default):
    parser.add_argument("--model_path", default=default, help="a directory, a hub name, or emu3-mini")
    parser.add_argument(
        "--vq_model_path",
        help="the vision tokenizer: a directory or a hub name (default: BAAI/Emu3-VisionTokenizer, or emu3-mini's own)",
    )


def usable_dtype(dtype, config):
    """`dtype`; where none is given that of a quantized checkpoint, or bfloat16. A CPU takes float32 for float16."""
    import paddle

    from paddlemix.external_ops import operators

    dtype, on_cpu = dtype or config.quantized_dtype or "bfloat16", paddle.get_device() == "cpu"
    if on_cpu and dtype == "float16":
        note("there is no float16 linear layer for a CPU: going on in float32")
        dtype = "float32"
    if on_cpu and operators() is None and 4 * step_parameters(config) > SLOW_BYTES:
        other = "" if dtype == "float32" else ", or take --dtype=float32"
        note(f"{dtype} is slow on a CPU without the compiled operators: run `{build_command()}`{other}")
    return dtype


def build_command():
    """The command that compiles the operators: only a checkout has a Makefile."""
    return "make ops" if (ROOT / "Makefile").is_file() else "python -m paddlemix.external_ops.build"


def load_language_model(args, tokenizer):
    from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM

    dtype = usable_dtype(args.dtype, Emu3Config.from_pretrained(args.model_path))
    model = Emu3ForCausalLM.from_pretrained(args.model_path, dtype=dtype)
    if model.config.vocab_size < len(tokenizer):
        raise InputError(
            f"{args.model_path} has {len(tokenizer)} tokens and a model of {model.config.vocab_size}: "
            "the tokenizer's files are another checkpoint's"
        )
    return model
