# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Text-to-image: draw pictures from prompts."""

from dataclasses import replace
from math import gcd, isqrt

from .console import Loading, Stopwatch, add_texts, integer, make_parser, note, number, progress_bar, say
from .files import Preview, free_paths, save_picture, write_stats, wrote
from .language_model import add_dtype, add_model_paths, load_language_model
from .unfinished import Unfinished, fingerprint


def parser(prog=None):
    parser = make_parser(__doc__, prog)
    add_model_paths(parser, "BAAI/Emu3-Gen")
    add_texts(parser, "prompt", ["a portrait of young girl."], "one or more, drawn together", prog is not None)
    parser.add_argument(
        "--ratio", nargs="+", help="width:height, one for all prompts or one each (default: of --width and --height)"
    )
    size = "(default: what the checkpoint is made for, 720; of emu3-mini 64)"
    parser.add_argument("--height", type=integer, help=f"with --width: how many pixels the picture has {size}")
    parser.add_argument("--width", type=integer, help=f"with --height: how many pixels the picture has {size}")
    parser.add_argument("--negative_prompt", help="what the picture must not be like (default: the original's)")
    parser.add_argument("--guidance_scale", type=number, default=3.0, help="1 is no guidance, and half the work")
    parser.add_argument(
        "--top_k", type=integer, default=2048, help="sample from so many likeliest tokens; 0 is all, 1 is greedy"
    )
    parser.add_argument("--top_p", type=number, default=1.0, help="sample from likeliest tokens of this probability")
    parser.add_argument("--temperature", type=number, default=1.0, help="below 1 is likelier, above 1 more varied")
    parser.add_argument("--seed", type=integer, help="the same seed gives the same picture (default: a new one)")
    parser.add_argument("--num_images", type=integer, default=1, help="pictures of each prompt, drawn together")
    parser.add_argument(
        "--decoding",
        default="auto",
        choices=["auto", "step", "jacobi"],
        help="step: sequential decoding, one token a forward pass; jacobi: several guessed tokens a forward pass, and "
        "only those that step would draw are accepted, so the picture is the same; auto: jacobi on a GPU, and for one "
        "picture on a CPU with the compiled operators or without guidance, else step",
    )
    parser.add_argument("--preview", metavar="FILE", help="write the picture so far to this PNG, every few rows")
    parser.add_argument(
        "--resume", action="store_true", help="continue what an interrupted run of the same command left"
    )
    add_dtype(parser)
    return parser


def main(args):
    sampling = sampling_of(args)
    settle_size(args)
    prompts, ratios = one_each(args)
    with Loading() as load:
        processor, model, positive, negative, sizes = load_parts(args, prompts, ratios)
    for ids, ratio, size in {r: (p, r, s) for p, r, s in zip(positive, ratios, sizes, strict=True)}.values():
        warn_if_too_long(model.config, processor, len(ids), ratio, size)
    unfinished = Unfinished(args, {
        "prompt": prompts, "negative_prompt": args.negative_prompt, "size": [list(s) for s in sizes],
        "seed": args.seed, "guidance_scale": args.guidance_scale, "top_k": args.top_k, "top_p": args.top_p,
        "temperature": args.temperature, "dtype": model.weight_dtype, "checkpoint": fingerprint(model),
    })  # fmt: skip
    if unfinished.settings["seed"] is None:
        unfinished.settings["seed"] = new_seed()
    sampling = replace(sampling, seed=unfinished.settings["seed"])
    factor = processor.vision_tokenizer.spatial_scale_factor
    say(f"drawing {', '.join(f'{factor * w} x {factor * h}' for h, w in sizes)} pixels with seed {sampling.seed}")

    kept = 0 if unfinished.drawn is None else sum(min(unfinished.drawn.shape[1], h * (w + 1) - 1) for h, w in sizes)
    if kept:
        say(f"going on after {kept} tokens of {unfinished.path}")
    tokens = sum(processor.grammar.num_tokens(h, w) for h, w in sizes)
    preview = Preview(args.preview, processor, sizes) if args.preview else None
    with unfinished:
        with progress_bar(tokens, " tokens", "drawing", kept) as bar, Stopwatch() as watch:
            pictures = draw(args, model, processor, positive, negative, sizes, sampling, unfinished, bar, preview)
        with Stopwatch() as decode:
            images = [processor.decode_image(codes) for codes in pictures.codes]
        paths = free_paths(args.output_dir, "result", len(sizes), own=unfinished.path)
        for i, (path, image) in enumerate(zip(paths, images, strict=True)):
            settings = {
                "prompt": prompts[i], "negative_prompt": args.negative_prompt, "ratio": ratios[i],
                "seed": sampling.seed, "image": i, "images": len(sizes), "guidance_scale": args.guidance_scale,
                "top_k": args.top_k, "top_p": args.top_p, "temperature": args.temperature,
                "model_path": args.model_path, "vq_model_path": args.vq_model_path, "dtype": model.weight_dtype,
            }  # fmt: skip
            save_picture(image, path, settings)
        if preview:
            preview.show(images)
        unfinished.finish()
    rate = (tokens - kept) / watch.seconds
    say(f"{tokens - kept} tokens in {watch.seconds:.1f} s, {rate:.1f} a second")
    write_stats(
        args, tokens=tokens - kept, seconds=watch.seconds, tokens_per_s=rate, forward_passes=pictures.forward_passes,
        load_s=load.seconds, decode_s=decode.seconds,
    )  # fmt: skip
    wrote(paths)


def sampling_of(args):
    """The Sampling that is asked for, of seed 0 where none is; InputError before anything is loaded."""
    from paddlemix.models.emu3.generation_emu3 import NEGATIVE_PROMPT, Sampling, check_guidance_scale

    check_guidance_scale(args.guidance_scale)
    if args.negative_prompt is None:
        args.negative_prompt = NEGATIVE_PROMPT
    return Sampling(args.temperature, args.top_k, args.top_p, 0 if args.seed is None else args.seed)


def load_parts(args, prompts, ratios):
    """(processor, model, ids of each prompt, of each negative prompt, size in codes of each picture)"""
    from paddlemix.models.emu3.generation_emu3 import POSITIVE_PROMPT
    from paddlemix.processors import Emu3Processor

    processor = Emu3Processor.from_pretrained(args.model_path, args.vq_model_path)
    size = {"ratio": ratios, "image_area": args.height * args.width}
    positive = processor([p + POSITIVE_PROMPT for p in prompts], **size)
    negative = processor([args.negative_prompt] * len(prompts), **size)["input_ids"]
    model = load_language_model(args, processor.tokenizer)
    return processor, model, positive["input_ids"], negative, [tuple(s) for s in positive["image_size"]]


def draw(args, model, processor, positive, negative, sizes, sampling, unfinished, bar, preview):
    """The codes of all pictures; after each row what is drawn is kept and shown."""
    from paddlemix.models.emu3 import generate_images

    def on_row(drawn):
        unfinished.save(drawn)
        rows = [len(processor.grammar.whole_rows(ids, h, w)) for ids, (h, w) in zip(drawn, sizes, strict=True)]
        bar.set_postfix_str(f"row {sum(rows)} of {sum(h for h, _ in sizes)}")
        if preview:
            preview.update(drawn)

    return generate_images(
        model, positive, sizes, processor.grammar, negative, args.guidance_scale, sampling,
        on_tokens=bar.update, decoding=args.decoding, drawn=unfinished.drawn, on_row=on_row,
    )  # fmt: skip


def settle_size(args):
    """A --height or --width that is not given is the side of a square of the checkpoint's image_area."""
    from paddlemix.models.emu3 import Emu3Config

    if None in (args.height, args.width):
        side = isqrt(Emu3Config.from_pretrained(args.model_path).image_area)
        args.height, args.width = (side if given is None else given for given in (args.height, args.width))


def one_each(args):
    """A prompt and a ratio for each picture: --num_images of every prompt, side by side."""
    from paddlemix.processors.emu3_processing import generate_size
    from paddlemix.utils import InputError

    if args.num_images < 1:
        raise InputError(f"--num_images must be 1 or more, got {args.num_images}")
    if args.height < 1 or args.width < 1:
        raise InputError(f"--height and --width must be positive, got {args.height} and {args.width}")
    for ratio in args.ratio or []:
        generate_size(ratio, args.height * args.width)  # a mistake is refused before anything is loaded
    common = gcd(args.width, args.height)
    ratios = args.ratio or [f"{args.width // common}:{args.height // common}"]
    if len(ratios) not in (1, len(args.prompt)):
        raise InputError(
            f"give one --ratio for all prompts or one each: {len(args.prompt)} prompts, {len(ratios)} ratios"
        )
    ratios = ratios * (len(args.prompt) // len(ratios))
    return [[x for x in values for _ in range(args.num_images)] for values in (args.prompt, ratios)]


def new_seed():
    import secrets

    return secrets.randbits(32)


def warn_if_too_long(config, processor, prompt_length, ratio, size):
    """Positions beyond those of the training give poor pictures: a note names a size within them."""
    from paddlemix.processors.emu3_processing import largest_size

    needed, limit = prompt_length + processor.grammar.num_tokens(*size), config.max_position_embeddings
    if needed > limit:
        factor = processor.vision_tokenizer.spatial_scale_factor
        best = largest_size(ratio, limit - prompt_length, processor.grammar, factor)
        advice = (
            f"the largest at {ratio} that fits is --height={best[0] * factor} --width={best[1] * factor}"
            if best
            else "no picture fits"
        )
        pixels = f"{size[1] * factor} x {size[0] * factor} pixels"
        note(f"{pixels} take {needed} tokens, the model has {limit} positions; {advice}")
