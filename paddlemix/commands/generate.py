# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Text-to-image: draw pictures from prompts."""

from paddlemix.results import save_results
from paddlemix.utils import InputError

from .console import Loading, Stopwatch, add_texts, integer, make_parser, note, number, progress_bar, say
from .files import Preview, write_stats, wrote
from .language_model import (
    add_dtype,
    add_model_paths,
    add_tensor_parallel,
    end_others,
    follows,
    make_pipeline,
    note_dtype,
)
from .unfinished import Unfinished


def parser(prog=None):
    parser = make_parser(__doc__, prog)
    add_model_paths(parser, "BAAI/Emu3-Gen")
    add_texts(parser, "prompt", ["a portrait of young girl."], "one or more, drawn together", prog is not None)
    parser.add_argument(
        "--ratio", nargs="+", help="width:height, one for all prompts or one each (default: of --width and --height)"
    )
    add_drawing(parser)
    parser.add_argument("--seed", type=integer, help="the same seed gives the same picture (default: a new one)")
    parser.add_argument("--num_images", type=integer, default=1, help="pictures of each prompt, drawn together")
    parser.add_argument(
        "--decoding",
        default="auto",
        choices=["auto", "step", "jacobi"],
        help="step: sequential decoding, one token a forward pass; jacobi: several guessed tokens a forward pass, and "
        "only those that step would draw are accepted, so the picture is the same; auto: jacobi on a GPU, and on a "
        "CPU as many guesses as pay for the dtype, the number of pictures, and the picture so far",
    )
    parser.add_argument("--preview", metavar="FILE", help="write the picture so far to this PNG, every few rows")
    parser.add_argument(
        "--resume", action="store_true", help="continue what an interrupted run of the same command left"
    )
    add_dtype(parser)
    add_tensor_parallel(parser)
    return parser


def add_drawing(parser):
    """What decides a picture beside its prompt, ratio and seed."""
    own = "(default: the checkpoint's own, else {})"
    size = "(default: what the checkpoint is made for, 720; of emu3-mini 64)"
    parser.add_argument("--height", type=integer, help=f"with --width: how many pixels the picture has {size}")
    parser.add_argument("--width", type=integer, help=f"with --height: how many pixels the picture has {size}")
    parser.add_argument("--negative_prompt", help="what the picture must not be like (default: the original's)")
    parser.add_argument("--guidance_scale", type=number, help=f"1 is no guidance, and half the work {own.format(3)}")
    parser.add_argument(
        "--top_k", type=integer, help=f"sample from so many likeliest tokens; 0 is all, 1 is greedy {own.format(2048)}"
    )
    parser.add_argument(
        "--top_p", type=number, help=f"sample from likeliest tokens of this probability {own.format(1)}"
    )
    parser.add_argument(
        "--temperature", type=number, help=f"below 1 is likelier, above 1 more varied {own.format(1)}"
    )


def main(args):
    from paddlemix.models.emu3.checkpoint import fingerprint

    emu3 = make_pipeline(args)
    if follows({None: emu3}):
        return
    with Loading() as load:
        generation = emu3.generate_steps(
            args.prompt, negative_prompt=args.negative_prompt, ratio=args.ratio, height=args.height, width=args.width,
            num_images=args.num_images, guidance_scale=args.guidance_scale, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, seed=args.seed, decoding=args.decoding,
        )  # fmt: skip
        note_dtype(emu3)
        emu3.load()
    for text in generation.notes:
        note(text)
    checkpoint = fingerprint(emu3.model.parameters())
    unfinished = Unfinished(args, {**generation.settings, "seed": args.seed, "checkpoint": checkpoint})
    try:
        generation.resume(unfinished.drawn, unfinished.settings["seed"])
    except InputError as error:
        raise InputError(f"{unfinished.path}: {error}" if unfinished.drawn else str(error)) from None
    unfinished.settings["seed"] = generation.seed
    sizes = ", ".join(f"{width} x {height}" for height, width in generation.sizes)
    say(f"drawing {sizes} pixels with seed {generation.seed}")
    kept = generation.gained
    if kept:
        say(f"going on after {kept} tokens of {unfinished.path}")
    with unfinished:
        with Stopwatch() as watch:
            draw(generation, unfinished, Preview(args.preview) if args.preview else None)
        processes = end_others(emu3, say)
        with Stopwatch() as decode:
            images = generation.images()
        texts = [generation.metadata(i) for i in range(len(images))]
        paths = save_results(images, args.output_dir, texts, unfinished.path)
        unfinished.finish()
    tokens = generation.tokens - kept
    rate = tokens / watch.seconds
    say(f"{tokens} tokens in {watch.seconds:.1f} s, {rate:.1f} a second")
    wrote(paths)
    if args.preview:
        Preview(args.preview).show(images)
    write_stats(
        args, tokens=tokens, seconds=watch.seconds, tokens_per_s=rate, forward_passes=generation.forward_passes,
        load_s=load.seconds, decode_s=decode.seconds, **processes,
    )  # fmt: skip


def draw(generation, unfinished, preview):
    """Draw to the end. After each row, and when it is interrupted, what is drawn is kept."""
    rows, total = generation.rows_drawn, sum(h for h, _ in generation.codes)
    with progress_bar(generation.tokens, " tokens", "drawing", generation.gained) as bar:
        try:
            for gained in generation:
                bar.update(gained)
                if generation.rows_drawn > rows:
                    rows = generation.rows_drawn
                    bar.set_postfix_str(f"row {rows} of {total}")
                    unfinished.save(generation.drawn())
                    if preview:
                        preview.update(generation)
        except KeyboardInterrupt:
            if generation.gained:
                unfinished.save(generation.drawn())
            raise
