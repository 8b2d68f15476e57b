# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model of a command: the arguments that name it, its dtype, loading it."""

from paddlemix.utils import InputError

from .console import note


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


def usable_dtype(dtype, quantized):
    """`dtype`; where none is given that of a quantized checkpoint, or bfloat16. A CPU takes float32 for float16."""
    import paddle

    from paddlemix.external_ops import operators

    dtype, on_cpu = dtype or quantized or "bfloat16", paddle.get_device() == "cpu"
    if on_cpu and dtype == "float16":
        note("there is no float16 linear layer for a CPU: going on in float32")
        dtype = "float32"
    if on_cpu and operators() is None:
        other = "" if dtype == "float32" else ", or take --dtype=float32"
        note(f"{dtype} is slow on a CPU without the compiled operators: run `make ops`{other}")
    return dtype


def load_language_model(args, tokenizer):
    from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM

    dtype = usable_dtype(args.dtype, Emu3Config.from_pretrained(args.model_path).quantized_dtype)
    model = Emu3ForCausalLM.from_pretrained(args.model_path, dtype=dtype)
    if model.config.vocab_size < len(tokenizer):
        raise InputError(
            f"{args.model_path} has {len(tokenizer)} tokens and a model of {model.config.vocab_size}: "
            "the tokenizer's files are another checkpoint's"
        )
    return model
