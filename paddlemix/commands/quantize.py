# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Write a language model's checkpoint again with int8 or int4 weights: a smaller file that loads as it is."""

from .console import bare_parser
from .rewrite import add_paths, rewrite


def parser(prog=None):
    parser = bare_parser(__doc__, prog)
    add_paths(parser)
    parser.add_argument("--dtype", required=True, choices=["int8", "int4"], help="of the linear layers")
    return parser


def main(args):
    rewrite(args)
