# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tuning's first step: encode images to tokens, and write them with their texts as Parquet files."""

import contextlib
import os
import signal

from paddlemix.utils import InputError, whole_number

from .console import Loading, Stopwatch, check_folder, integer, make_parser, note, progress_bar, say, to_stderr
from .files import write_stats
from .language_model import note_vision


def parser(prog=None):
    parser = make_parser(__doc__, prog, writes_pictures=False)
    parser.add_argument(
        "--vq_model_path", default="BAAI/Emu3-VisionTokenizer", help="a directory, a hub name, or emu3-mini"
    )
    parser.add_argument(
        "--data_path", nargs="+", required=True, metavar="PATH", help="one or more: .json, .jsonl, .parquet or .tar "
        "(WebDataset) files, or folders of images with .txt files"
    )  # fmt: skip
    parser.add_argument("--output_path", required=True, metavar="DIR", help="a folder; the same command goes on in it")
    parser.add_argument(
        "--image_area", type=integer, help="about how many pixels an image becomes (default: 518400, 720 x 720, as in "
        "the original; of emu3-mini 4096)"
    )  # fmt: skip
    add_batch_size(parser)
    parser.add_argument("--shard_rows", type=integer, default=1000, help="rows of a file")
    return parser


def add_batch_size(parser):
    parser.add_argument(
        "--batch_size", type=integer, help="images of one size that are encoded together (default: 1 on a CPU; on a "
        "card up to 8, as its memory has room)"
    )  # fmt: skip


def main(args):
    import paddle

    from paddlemix.jobs.inputs import open_sources, read_rows
    from paddlemix.jobs.outputs import Shards
    from paddlemix.jobs.workers import in_order, make_processor, run
    from paddlemix.machine import available_cores
    from paddlemix.models.emu3 import Emu3Config, Emu3VisionVQModel
    from paddlemix.models.emu3.hub import MINI
    from paddlemix.training.prepare_data import prepare, schema

    for name in ("batch_size", "shard_rows"):
        if getattr(args, name) is not None:
            whole_number(f"--{name}", getattr(args, name), "1 or more", 1)
    sources = open_sources(args.data_path)
    if args.image_area is None:
        args.image_area = Emu3Config.from_pretrained(MINI).image_area if args.vq_model_path == MINI else 720 * 720
    processor = make_processor(args.vq_model_path, args.image_area)
    check_folder("output_path", args.output_path)
    with Loading() as load:
        model = Emu3VisionVQModel.from_pretrained(args.vq_model_path, progress=True)
        note_vision(model)
    job = {
        "vq_model": named(args.vq_model_path, model),
        "image_area": args.image_area,
        "data": [source.identity for source in sources],
    }
    on_cpu, total = paddle.get_device() == "cpu", sum(source.count for source in sources)
    threads = 1 if on_cpu else available_cores()  # which read images beside
    batch_size = args.batch_size or fitting_batch(model, args.image_area)
    advice = f"what is encoded is in {args.output_path}, and the same command goes on from there"
    with interruptible(advice), Shards(args.output_path, schema(), args.shard_rows, job) as shards:
        before = shards.count
        if before:
            say(f"going on behind {before} of {total} rows")
        rows = read_rows(sources, before, shards.ids)
        with Stopwatch() as watch, progress_bar(total, " images", "encoding", before) as bar:
            worker = prepare(model, processor, args.image_area, batch_size, threads)
            for row in in_order(run(worker, enumerate(rows))):
                shards.add(row)
                bar.update()
        shards.finish()
    summarize(args, args.output_path, shards, "prepared", before, watch.seconds, load.seconds)


def named(path, model):
    """A model as a job names it: another one of this name has other weights."""
    from paddlemix.models.emu3.checkpoint import fingerprint

    return f"{path} {fingerprint(model.parameters()):08x}"


def fitting_batch(model, image_area, most=8):
    """How many images take no more than half of the card's free memory; 1 on a CPU, which takes one after the other."""
    import paddle

    from paddlemix.machine import free_memory

    if paddle.get_device() == "cpu":
        return 1
    while most > 1 and model.memory_to_encode(most, image_area) > free_memory() / 2:
        most //= 2
    return most


def summarize(args, folder, shards, what, before, seconds, load_s):
    """Print what a job has written into a folder, where `before` rows were, and write --stats_json."""
    good = shards.count - shards.failed
    for source, error in shards.errors:
        note(f"{source}: {error}")
    if shards.failed > len(shards.errors):
        note(f"and {shards.failed - len(shards.errors)} more: their column `error` says why")
    if not good:
        raise InputError(f"none of the {shards.count} rows could be {what}; {folder} has their errors")
    without = f", and {shards.failed} rows with errors" if shards.failed else ""
    say(f"wrote {good} rows{without} to {folder}")
    done = shards.count - before
    write_stats(
        args, rows=done, rows_in_all=shards.count, errors=shards.failed, seconds=seconds, rows_per_s=done / seconds,
        load_s=load_s,
    )  # fmt: skip


@contextlib.contextmanager
def interruptible(advice):
    """SIGTERM in the block is Ctrl-C, so that what is done is kept; both print how to go on."""
    ended = []

    def end(which, frame):
        ended.append(which)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        if ended:
            to_stderr(f"\nended: {advice}")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt(advice) from None
    finally:
        signal.signal(signal.SIGTERM, before)
