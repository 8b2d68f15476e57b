# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Image question answering: answer questions about pictures."""

from .console import Loading, Stopwatch, add_texts, integer, make_parser, note, print_result, to_stderr
from .files import load_pictures, write_stats
from .language_model import (
    add_dtype,
    add_model_paths,
    add_tensor_parallel,
    end_others,
    follows,
    make_pipeline,
    note_dtype,
)


def parser(prog=None):
    parser = make_parser(__doc__, prog, writes_pictures=False)
    add_model_paths(parser, "BAAI/Emu3-Chat")
    parser.add_argument(
        "--image_path",
        nargs="+",
        default=["paddlemix/demo_images/emu3_demo.png"],
        help="one or more, answered together; larger ones than the checkpoint takes in a question are scaled",
    )
    add_texts(
        parser, "question", ["Please describe the image"], "one for all pictures or one each", prog is not None
    )  # fmt: skip
    parser.add_argument(
        "--max_new_tokens", type=integer, help="the longest answer (default: 1024, or what the model has positions for)"
    )
    parser.add_argument(
        "--chat_template", help="with {image_prompt} and {text_prompt} (default: Emu3-Chat's; Emu3-Stage1's is "
        "'{image_prompt}{text_prompt}')"
    )  # fmt: skip
    add_dtype(parser)
    add_tensor_parallel(parser)
    return parser


def main(args):
    pictures, questions = pairs(args)
    emu3 = make_pipeline(args, args.chat_template)
    if follows({None: emu3}):
        return
    with Loading() as load:
        note_dtype(emu3)  # a mistyped --model_path is told here, before the vision tokenizer is read
        images = load_pictures(pictures, emu3.image_processor)
        answers = emu3.understand_steps(images, questions, max_new_tokens=args.max_new_tokens)
    for text in answers.notes:
        note(text)
    titles = [f"{path}: {question}\n" for path, question in zip(pictures, questions, strict=True)]
    with Stopwatch() as watch:
        show(answers, titles if len(titles) > 1 else [""])
    processes = end_others(emu3, to_stderr)
    rate = answers.tokens / watch.seconds
    to_stderr(f"{answers.tokens} tokens in {watch.seconds:.1f} s, {rate:.1f} a second")
    write_stats(
        args, tokens=answers.tokens, seconds=watch.seconds, tokens_per_s=rate, forward_passes=answers.forward_passes,
        load_s=load.seconds, encode_s=answers.encode_s, **processes,
    )  # fmt: skip


def pairs(args):
    """A question for each picture; one of either serves all of the other."""
    from paddlemix.utils import InputError

    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens must be 1 or more, got {args.max_new_tokens}")
    pictures, questions = args.image_path, args.question
    if len(pictures) != len(questions) and 1 not in (len(pictures), len(questions)):
        raise InputError(f"give a --question for each picture, or one for all: {len(pictures)} and {len(questions)}")
    count = max(len(pictures), len(questions))
    return pictures * (count // len(pictures)), questions * (count // len(questions))


def show(answers, titles):
    """Print an Understanding's texts as they come: the first at once, each next one when those before it have ended."""
    row, waiting = 0, [""] * len(titles)
    print_result(titles[0], end="")
    for texts in answers:
        waiting = [old + new for old, new in zip(waiting, texts, strict=True)]
        while row < len(titles):
            print_result(waiting[row], end="")
            waiting[row] = ""
            if not answers.ended[row]:
                break
            row += 1
            print_result("\n" + (titles[row] if row < len(titles) else ""), end="")
