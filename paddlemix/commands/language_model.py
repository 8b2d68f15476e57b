# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model of a command: the arguments that name it, and the pipeline that they make."""

import os
import signal

from paddlemix.models.emu3.needs import step_parameters
from paddlemix.utils import InputError

from .console import Loading, note

# Without the compiled operators Paddle computes in float32 on a CPU. A model that reads less for a token is quick
# enough without them, and no note is due.
SLOW_BYTES = 100e6

LORA_HELP = (
    "a LoRA adapter of the language model, as `emu3 train` and PEFT write it: a folder or a hub name; of a training "
    "run's folder, its newest checkpoint"
)


def add_dtype(parser):
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16", "int8", "int4"],
        help="of the language model: int8 and int4 quantize its linear layers while they are read "
        "(default: bfloat16, or float16 on a card without it; of a quantized checkpoint, its own)",
    )


def add_model_paths(parser, default):
    parser.add_argument("--model_path", default=default, help="a directory, a hub name, or emu3-mini")
    parser.add_argument(
        "--vq_model_path",
        help="the vision tokenizer: a directory or a hub name (default: BAAI/Emu3-VisionTokenizer, or emu3-mini's own)",
    )
    parser.add_argument("--lora_path", help=LORA_HELP)


def add_tensor_parallel(parser):
    parser.add_argument(
        "--tensor_parallel", action="store_true", help="share the language model among the processes of "
        "`python -m paddle.distributed.launch --nproc_per_node N` (or --gpus 0,1), which this program is started by: "
        "each has a part of the weights"
    )  # fmt: skip


def make_pipeline(args, chat_template=None):
    """The Emu3Pipeline of a command's arguments. Nothing is read yet."""
    from paddlemix.pipelines import Emu3Pipeline

    options = {} if chat_template is None else {"chat_template": chat_template}
    return Emu3Pipeline(
        args.model_path, args.vq_model_path, args.dtype, progress=True, lora_path=args.lora_path,
        ranks=make_ranks(args), **options,
    )  # fmt: skip


def make_ranks(args):
    """The TensorParallel of --tensor_parallel; None without it."""
    if not getattr(args, "tensor_parallel", False):  # not every command has it
        return None
    from paddlemix.models.emu3.parallel import TensorParallel

    if int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) < 2:
        raise InputError(
            "--tensor_parallel is for several processes: start the program of paddlemix/examples/emu3/ by "
            "`python -m paddle.distributed.launch --nproc_per_node 2`"
        )
    return TensorParallel("start the same command again")


def follows(pipelines):
    """Of several processes all but the first only compute their part of its passes. Whether this is one of those; then
    the work is done. pipelines: {name: Emu3Pipeline}, as the first one's batches have the names."""
    first = next(iter(pipelines.values()))
    ranks = first.ranks
    if ranks is None or ranks.rank == 0:
        return False
    from paddlemix.models.emu3.shared_batch import follow

    with Loading():
        _ = first.model
    for which in (signal.SIGINT, signal.SIGTERM):  # the first process takes them, and ends this one
        signal.signal(which, signal.SIG_IGN)
    follow(ranks, pipelines)
    return True


def end_others(pipeline, tell):
    """Let the other processes end; what all have read and used, for the statistics, and told in a line."""
    if pipeline.ranks is None:
        return {}
    from paddlemix.models.emu3.shared_batch import end

    processes = end(pipeline.model)
    read = ", ".join(f"{one['bytes_read'] / 1e6:.1f}" for one in processes)
    used = ", ".join(f"{one['peak_memory_mb']:.0f}" for one in processes)
    tell(f"{len(processes)} processes read {read} MB of weights, and had at most {used} MB in memory")
    return {"processes": processes}


def note_dtype(emu3):
    """A note on a dtype that the device does not have, or has slowly."""
    import paddle

    from paddlemix.external_ops import build_command, operators
    from paddlemix.external_ops.few_rows_linear import kernel_fault
    from paddlemix.machine import half_dtype

    on_cpu, config = paddle.get_device() == "cpu", emu3.config
    if on_cpu and emu3.asked_dtype == "float16":
        note("there is no float16 linear layer for a CPU: going on in float32")
    if not on_cpu and emu3.dtype != "float32" and half_dtype() == "float16" != emu3.asked_dtype:
        note("this card has no bfloat16: going on in float16")
    if not on_cpu and emu3.dtype in ("int8", "int4"):
        card = int(paddle.get_device().removeprefix("gpu:"))
        fault = kernel_fault(getattr(paddle, half_dtype()), int(emu3.dtype[3:]), card)
        if fault:
            note(f"{emu3.dtype} computes by Paddle's products, slower than bfloat16: {fault}")
    if on_cpu and operators() is None and 4 * step_parameters(config) > SLOW_BYTES:
        other = "" if emu3.dtype == "float32" else ", or take --dtype=float32"
        note(f"{emu3.dtype} is slow on a CPU without the compiled operators: run `{build_command()}`{other}")


def note_vision(model):
    """A note on a large vision tokenizer on a CPU without the compiled operators, which halve its time."""
    from paddlemix.external_ops import build_command, operators

    weights = sum(4 * parameter.size for parameter in model.parameters())
    if operators() is None and weights > SLOW_BYTES and model.quantize.embedding.weight.place.is_cpu_place():
        note(f"a CPU takes twice as long without the compiled operators: run `{build_command()}`")
