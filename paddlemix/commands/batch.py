# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Many rows of files through a model: text-to-image, image question answering, encode or decode. The output has each
row once, however often the job is killed and started again: emu3 batch generate --input prompts.jsonl --output drawn
--model_path=emu3-mini"""

import time
from contextlib import ExitStack
from functools import partial

from paddlemix.machine import start_paddle
from paddlemix.utils import InputError, real_number, whole_number

from .console import Loading, Stopwatch, add_tasks, bare_parser, check_folder, integer, number, progress_bar, say
from .generate import add_drawing
from .language_model import add_dtype, add_model_paths, make_pipeline, note_dtype, note_vision
from .prepare import add_batch_size, fitting_batch, interruptible, named, summarize

SAY_EVERY = 60  # seconds, where there is no terminal for a bar


def parser(prog=None):
    parser = bare_parser(__doc__, prog, verbose=False)
    add_tasks(parser, {
        "generate": ("text-to-image: a picture of each row's prompt", add_generate),
        "understand": ("image question answering: of each row's image and question", add_understand),
        "encode": ("the codes of each row's image", add_encode),
        "decode": ("the picture or video of each row's codes", add_decode),
    })  # fmt: skip
    return parser


def add_files(parser, rows, workers=True):
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help=f"one or more: .jsonl, .json, .parquet or .tar "
        f"(WebDataset) files, of rows with an id and {rows}"
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a folder; the same command goes on in it")
    parser.add_argument("--shard_rows", type=integer, default=1000, help="rows of a file")
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="work in several processes by Ray, of a cluster (auto, "
        'HOST:PORT), or without an address of this machine; needs pip install "ray[serve]==2.60.0"',
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=integer, help="with --ray: processes, each with its own model (default: one a card, or one a "
        "machine without)"
    )  # fmt: skip


def add_seed(parser, what):
    parser.add_argument(
        "--seed", type=integer, default=0, help=f"a row without a seed gets its own, of this one and its id{what}"
    )


def add_generate(parser):
    add_files(parser, "a prompt; a row's ratio, seed and so on, named as the options are, come before these")
    add_model_paths(parser, "BAAI/Emu3-Gen")
    parser.add_argument("--ratio", help="width:height (default: of --width and --height)")
    add_drawing(parser)
    add_seed(parser, "")
    add_images(parser, "write the pictures as well")
    parser.add_argument("--batch_size", type=integer, help="pictures at once (default: as many as memory takes)")
    add_dtype(parser)


def add_understand(parser):
    add_files(parser, "an image and a question; a row's seed and so on come before the options")
    add_model_paths(parser, "BAAI/Emu3-Chat")
    parser.add_argument("--question", default="Please describe the image", help="of rows without one")
    parser.add_argument("--max_new_tokens", type=integer, help="the longest answer (default: 1024)")
    parser.add_argument("--chat_template", help="as `emu3 understand` takes it")
    parser.add_argument("--top_k", type=integer, help="sample from so many likeliest tokens (default: greedy)")
    parser.add_argument("--top_p", type=number, help="sample from likeliest tokens of this probability")
    parser.add_argument("--temperature", type=number, help="sample; below 1 is likelier, above 1 more varied")
    add_seed(parser, ", where answers are sampled")
    parser.add_argument("--batch_size", type=integer, help="answers at once (default: as many as memory takes)")
    add_dtype(parser)


def add_encode(parser):
    add_files(parser, "an image, or a video, such as clip.mp4, which needs pip install av==17.1.0")
    add_vision(parser)
    parser.add_argument(
        "--image_area", type=integer, help="about how many pixels an image becomes, as in `emu3 prepare` (default: its "
        "own size, within what the vision tokenizer takes)"
    )  # fmt: skip
    add_batch_size(parser)


def add_decode(parser):
    add_files(parser, "codes, height and width, as the other tasks and `emu3 prepare` write them")
    add_vision(parser)
    add_images(parser, "how the pictures are written", "png", "; a video is ID.mp4, which needs pip install av==17.1.0")
    parser.add_argument("--frame_rate", type=number, default=25, help="of videos, frames a second")


def add_vision(parser):
    parser.add_argument(
        "--vq_model_path", default="BAAI/Emu3-VisionTokenizer", help="a directory, a hub name, or emu3-mini"
    )


def add_images(parser, what, default=None, videos=""):
    parser.add_argument(
        "--images", nargs="?", const="png", default=default, choices=["png", "webdataset"], help=f"{what}: png is a "
        f"file each, images/ID.png; webdataset is part-00000.tar and so on, with ID.png and ID.json{videos}",
    )  # fmt: skip


def main(args):
    import paddle

    from paddlemix.jobs.actors import Actors
    from paddlemix.jobs.inputs import open_sources, read_rows
    from paddlemix.jobs.outputs import Shards
    from paddlemix.jobs.workers import in_order, run, schema

    for name in ("batch_size", "shard_rows", "workers", "max_new_tokens"):
        if getattr(args, name, None) is not None:
            whole_number(f"--{name}", getattr(args, name), "1 or more", 1)
    if args.workers is not None and args.ray is None:
        raise InputError("--workers is for --ray: give both")
    sources = open_sources(args.input)
    check_folder("output", args.output)
    total, images = sum(source.count for source in sources), getattr(args, "images", None)
    with ExitStack() as stack:
        with Loading() as load:
            if args.ray is None:
                worker = make_worker(args)
                work = partial(run, worker)
            else:
                make = partial(make_in_actor, args, paddle.get_device().split(":")[0])
                worker = stack.enter_context(Actors(make, args.workers, args.ray))
                work = worker.run
        job = {**worker.job, "images": images, "data": [source.identity for source in sources]}
        stack.enter_context(
            interruptible(f"what is done is in {args.output}, and the same command goes on from there")
        )
        shards = stack.enter_context(Shards(args.output, schema(), args.shard_rows, job, images))
        before, columns = shards.count, dict.fromkeys(schema().names)
        if before:
            say(f"going on behind {before} of {total} rows")
        rows = enumerate(read_rows(sources, before, shards.ids))
        with Stopwatch() as watch:
            for values in in_order(shown(work(rows), total, before, args.task)):
                shards.add({**columns, **values})
        shards.finish()
    summarize(args, args.output, shards, "finished", before, watch.seconds, load.seconds)


def make_in_actor(args, device):
    """The worker in a process of Ray's, which has one card or none."""
    start_paddle(device, quiet=not args.verbose)
    return make_worker(args)


def make_worker(args):
    """The worker of a task, with its model; its `job` is what the rows depend on, as JSON has it."""
    if args.task in ("encode", "decode"):
        return make_vision_worker(args)
    from paddlemix.jobs import workers
    from paddlemix.pipelines.emu3 import answer_sampling

    emu3, draws = make_pipeline(args, getattr(args, "chat_template", None)), args.task == "generate"
    given = {name: getattr(args, name) for name in (workers.DRAWING if draws else workers.ANSWERING)}
    given = {name: value for name, value in given.items() if value is not None}
    if draws:  # a mistake in an option is one of the command, not of each row
        emu3.check_generate("x", **given)
    else:
        answer_sampling(**{name: value for name, value in given.items() if name != "max_new_tokens"})
    note_dtype(emu3)
    emu3.load()
    if draws:
        worker = workers.generate(emu3, given, args.batch_size, args.images is not None)
        options = {**emu3.defaults, **given}
    else:
        worker = workers.understand(emu3, given, args.question, args.batch_size)
        options = {**given, "question": args.question, "chat_template": emu3.chat_template}
    worker.job = {
        "task": args.task, "model": named(args.model_path, emu3.model), "lora": args.lora_path,
        "dtype": emu3.model.weight_dtype, "vq_model": named(args.vq_model_path, emu3.vision_tokenizer),
        "options": options,
    }  # fmt: skip
    return worker


def make_vision_worker(args):
    import paddle

    from paddlemix.jobs import workers
    from paddlemix.machine import available_cores
    from paddlemix.pipelines import Emu3Pipeline

    emu3 = Emu3Pipeline(vq_model_path=args.vq_model_path, progress=True)
    model = emu3.vision_tokenizer
    note_vision(model)
    job = {"task": args.task, "vq_model": named(args.vq_model_path, model)}
    if args.task == "decode":
        rate = real_number("--frame_rate", args.frame_rate, "a number from 1 to 1000", 1, 1000)
        worker = workers.Decode(emu3, rate)
        worker.job = {**job, "frame_rate": rate}
        return worker
    on_cpu = paddle.get_device() == "cpu"
    area = args.image_area or emu3.image_processor.max_pixels
    worker = workers.encode(
        emu3, args.image_area, args.batch_size or fitting_batch(model, area),
        1 if on_cpu else available_cores(),
    )  # fmt: skip
    worker.job = {**job, "image_area": args.image_area}
    return worker


def shown(numbered, total, before, what):
    """The same rows, with a bar on the terminal, or else a line each minute."""
    start = then = time.monotonic()
    with progress_bar(total, " rows", what, before) as bar:
        for count, one in enumerate(numbered, 1):
            bar.update()
            now = time.monotonic()
            if bar.disable and now - then > SAY_EVERY:
                then, rate = now, count / (now - start)
                left = (total - before - count) / rate
                say(f"{before + count} of {total} rows, {rate:.3g} a second, {bar.format_interval(left)} left")
            yield one
