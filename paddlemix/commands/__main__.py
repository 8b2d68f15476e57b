# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The command `emu3`: its verbs, each a module of this package."""

import importlib
import sys
from difflib import get_close_matches

from paddlemix import __doc__ as DESCRIPTION
from paddlemix import __version__
from paddlemix.utils import InputError

from .console import errors_of_one_line, print_result, run

VERBS = {
    "generate": "text-to-image: draw pictures from prompts",
    "understand": "image question answering",
    "autoencode": "reconstruct an image, or a video's frames, from its tokens",
    "serve": "a service for many at once: OpenAI's endpoints, and a page",
    "batch": "many rows of a file through any of the first three, killed and resumed at will",
    "prepare": "fine-tuning's data: images and texts to tokens, as Parquet",
    "train": "fine-tune a language model",
    "merge": "write a checkpoint again with a LoRA adapter merged in",
    "quantize": "write a checkpoint again with int8 or int4 weights",
    "info": "list versions, device, operators and memory, and what a checkpoint needs of them",
}
EXAMPLE = 'emu3 generate "a large red circle on a white background." --model_path emu3-mini'


def main(arguments=None):
    with errors_of_one_line(arguments is None):
        verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
        if verb in ("-h", "--help", "help"):
            verbs = [f"  {name:<12}{what}" for name, what in VERBS.items()]
            lines = ["usage: emu3 VERB ...", "", DESCRIPTION, "", *verbs, ""]
            lines += ["emu3 VERB --help lists the arguments of a verb. An example:", f"  {EXAMPLE}"]
            print_result("\n".join(lines))
        elif verb == "--version":
            print_result(f"emu3 {__version__}")
        elif verb not in VERBS:
            near = get_close_matches(verb, VERBS, 1)
            advice = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
            raise InputError(f"emu3 has no verb {verb[:40]!r}: {advice}")
        else:
            command = importlib.import_module(f"paddlemix.commands.{verb}")
            run(command.parser(f"emu3 {verb}"), command.main, rest)


if __name__ == "__main__":
    main()
