# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Write a checkpoint again: the weights as they are read, the other files as they are, whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path

from paddlemix.models.emu3.needs import weight_bytes
from paddlemix.utils import InputError

from .console import Loading, say


def add_paths(parser):
    parser.add_argument("--model_path", required=True, help="a directory, a hub name, or emu3-mini")
    parser.add_argument("--output_path", required=True, metavar="DIR", help="the new checkpoint, a folder")
    parser.set_defaults(device="cpu")  # a card keeps the weights in the order of its own kernels


def rewrite(args, lora_path=None):
    """Write args.model_path in args.dtype to args.output_path, with an adapter merged in where one is given."""
    from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM
    from paddlemix.models.emu3.checkpoint import open_weights
    from paddlemix.models.emu3.configuration_emu3 import QUANTIZATIONS
    from paddlemix.models.emu3.tokenization_emu3 import files_beside

    config, target = Emu3Config.from_pretrained(args.model_path), Path(args.output_path)
    if config.quantized_dtype:
        raise InputError(f"{args.model_path} is {config.quantized_dtype} already: take what it was made from")
    config = config.quantized(args.dtype) if args.dtype in QUANTIZATIONS else config
    check_target(target, weight_bytes(config, args.dtype))
    with Loading():
        model = Emu3ForCausalLM.from_pretrained(args.model_path, dtype=args.dtype, lora_path=lora_path)
        beside = files_beside(args.model_path)
        files = set(open_weights(args.model_path).values())
        before = sum(file.path.stat().st_size for file in files)
        for file in files:
            file.close()
    write(model, beside, target.resolve())
    after = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    say(f"weights: {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB in {args.dtype}")
    say(f"wrote {target}")


def check_target(target, size):
    """InputError where a new folder of so many bytes cannot be written."""
    place = target.resolve()  # where links and .. lead
    if place.exists() and (not place.is_dir() or any(place.iterdir()) or place.samefile(Path.cwd())):
        raise InputError(f"--output_path {target} is not an empty folder elsewhere: give the name of a new one")
    parent = next(p for p in place.parents if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--output_path {target}: cannot write into {parent}: give another folder")
    free = shutil.disk_usage(parent).free
    if size > free:
        raise InputError(f"--output_path {target} takes {size / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free there")


def write(model, files, target):
    """The model and copies of the files, in a folder beside that takes its name when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(beside)
        for path in files:
            shutil.copyfile(path, beside / path.name)
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o777 & ~umask)  # as any new folder: mkdtemp's is the owner's alone
        beside.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
