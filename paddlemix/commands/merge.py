# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Merge a LoRA adapter into its language model: a whole checkpoint, which loads as any other."""

from .console import bare_parser
from .language_model import LORA_HELP
from .rewrite import add_paths, rewrite


def parser(prog=None):
    parser = bare_parser(__doc__, prog)
    add_paths(parser)
    parser.add_argument("--lora_path", required=True, help=LORA_HELP)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "int8", "int4"],
        help="of the weights: int8 and int4 quantize the linear layers after the adapter is merged in",
    )
    return parser


def main(args):
    rewrite(args, args.lora_path)
