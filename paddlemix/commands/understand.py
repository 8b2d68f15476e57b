# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Image question answering: answer questions about pictures."""

import sys

from .console import Loading, Stopwatch, add_texts, integer, make_parser, note
from .files import load_pictures, write_stats
from .language_model import add_dtype, add_model_paths, load_language_model


def parser(prog=None):
    parser = make_parser(__doc__, prog, writes_pictures=False)
    add_model_paths(parser, "BAAI/Emu3-Chat")
    parser.add_argument(
        "--image_path",
        nargs="+",
        default=["paddlemix/demo_images/emu3_demo.png"],
        help="one or more, answered together",
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
    return parser


def main(args):
    from paddlemix.models.emu3 import generate_text
    from paddlemix.processors import Emu3Processor
    from paddlemix.processors.emu3_processing import CHAT_TEMPLATE, check_chat_template

    pictures, questions = pairs(args)
    template = args.chat_template or CHAT_TEMPLATE
    check_chat_template(template)
    with Loading() as load:
        processor = Emu3Processor.from_pretrained(args.model_path, args.vq_model_path, chat_template=template)
        images = load_pictures(pictures, processor.image_processor)
        model = load_language_model(args, processor.tokenizer)
    with Stopwatch() as encode:
        prompts = processor(questions, images, mode="U")["input_ids"]
    length, limit = max(map(len, prompts)), model.config.max_position_embeddings
    if args.max_new_tokens is None:
        args.max_new_tokens = min(1024, max(1, limit - length))
    length += args.max_new_tokens
    if length > limit:
        note(f"prompt and answer take up to {length} tokens, the model has {limit} positions: lower --max_new_tokens")
    titles = [f"{path}: {question}\n" for path, question in zip(pictures, questions, strict=True)]
    with Stopwatch() as watch:
        steps = generate_text(model, prompts, args.max_new_tokens)
        answers, passes = show(processor.tokenizer, steps, titles if len(titles) > 1 else [""])
    tokens = sum(map(len, answers))
    rate = tokens / watch.seconds
    print(f"{tokens} tokens in {watch.seconds:.1f} s, {rate:.1f} a second", file=sys.stderr)
    write_stats(
        args, tokens=tokens, seconds=watch.seconds, tokens_per_s=rate, forward_passes=passes,
        load_s=load.seconds, encode_s=encode.seconds,
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


def show(tokenizer, steps, titles):
    """Print answers as they come, the first row at once, each next one when those before it have ended.

    Returns (ids of each answer, number of steps).
    """
    answers, row, shown, passes = [[] for _ in titles], 0, 0, 0
    print(titles[0], end="", flush=True)
    for new in steps:
        passes += 1
        for ids, token in zip(answers, new, strict=True):
            ids += [] if token is None else [token]
        while row < len(titles):
            text = tokenizer.decode(answers[row], skip_special_tokens=True)
            whole = text if new[row] is None else text.rstrip("\ufffd")  # a character's other bytes may come yet
            print(whole[shown:], end="", flush=True)
            shown = len(whole)
            if new[row] is not None:
                break
            row, shown = row + 1, 0
            print("\n" + (titles[row] if row < len(titles) else ""), end="", flush=True)
    for i in range(row, len(titles)):  # cut off by --max_new_tokens
        text = tokenizer.decode(answers[i], skip_special_tokens=True)
        print((titles[i] if i > row else "") + text[shown if i == row else 0 :], flush=True)
    return answers, passes
