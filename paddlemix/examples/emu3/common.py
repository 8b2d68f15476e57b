# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the three commands share: their common arguments, quiet start, statistics and one-line errors."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from paddlemix.utils import InputError, peak_host_memory, replacing, write_atomically

ROOT = Path(__file__).resolve().parents[3]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" tells nobody anything
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument("--output_dir", default=".", help="where results are written")
    parser.add_argument("--device", help="cpu, gpu or gpu:N (default: the GPU if Paddle has one)")
    parser.add_argument("--stats_json", metavar="FILE", help="write times, tokens and peak memory to this file")
    parser.add_argument("--verbose", action="store_true", help="show the notices of the libraries, too")
    return parser


def add_dtype(parser):
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"], help="of the language model"
    )


def run(parser, command):
    """Run a command. A user's mistake is one line on stderr and exit code 2; Ctrl-C exits with 130."""
    args = parser.parse_args()
    try:
        _check_outputs(args)
        _start_paddle(args)
        command(args)
    except (InputError, OSError) as error:
        message = " ".join(str(error).split())
        sys.exit(_say(f"error: {message}", code=2))
    except KeyboardInterrupt:
        sys.exit(_say("\ninterrupted: nothing more was written", code=130))


def note(text):
    _say(f"note: {text}", code=0)


def _say(text, code):
    print(text, file=sys.stderr, flush=True)
    return code


def _check_outputs(args):
    """Hours of work must not end in a folder that cannot be written."""
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {args.output_dir} cannot be made: {error.strerror}") from None
    for folder in [args.output_dir] + ([Path(args.stats_json).parent] if args.stats_json else []):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"cannot write into {folder}: give a folder that exists and that you may write to")


def _start_paddle(args):
    if not args.verbose:
        import logging
        import warnings

        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("GLOG_minloglevel", "2")
    import paddle

    if "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] == "1":
        paddle.base.core.set_num_threads(available_cores())  # Paddle itself would use one
    try:
        paddle.set_device(args.device or ("gpu" if paddle.device.cuda.device_count() else "cpu"))
    except (ValueError, RuntimeError):
        raise InputError(
            f"--device {args.device}: accepted are cpu, and gpu or gpu:N where Paddle finds a card; this Paddle is "
            f"{'a CUDA' if paddle.is_compiled_with_cuda() else 'a CPU'} build with "
            f"{paddle.device.cuda.device_count()} cards"
        ) from None


def available_cores():
    """Cores that this process may use: its affinity, less where the container's quota is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def usable_dtype(dtype):
    """`dtype`, or float32 on a CPU: Paddle has no Linear of 16 bits there."""
    import paddle

    if paddle.get_device() == "cpu" and dtype != "float32":
        note(f"Paddle has no {dtype} Linear on a CPU: going on in float32")
        return "float32"
    return dtype


def load_models(args):
    """(model, image processor, vision tokenizer, tokenizer) of --model_path and --vq_model_path."""
    from paddlemix.models.emu3 import Emu3ForCausalLM, Emu3Tokenizer, Emu3VisionVQModel
    from paddlemix.processors import Emu3VisionVQImageProcessor

    tokenizer = Emu3Tokenizer.from_pretrained(args.model_path)
    image_processor = Emu3VisionVQImageProcessor.from_pretrained(args.vq_model_path)
    vision_tokenizer = Emu3VisionVQModel.from_pretrained(args.vq_model_path)
    model = Emu3ForCausalLM.from_pretrained(args.model_path, dtype=usable_dtype(args.dtype))
    if model.config.vocab_size < len(tokenizer):
        raise InputError(
            f"{args.model_path} has {len(tokenizer)} tokens and a model of {model.config.vocab_size}: "
            "the tokenizer's files are another checkpoint's"
        )
    return model, image_processor, vision_tokenizer, tokenizer


def find_file(path):
    """`path`, or the project's own file of that name where a command runs in another folder."""
    return path if Path(path).exists() or not (ROOT / path).exists() else ROOT / path


class Stopwatch:
    """`with Stopwatch() as watch:` then `watch.seconds`."""

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exception):
        self.seconds = time.perf_counter() - self.start


def progress_bar(total, unit, description):
    """A bar on the terminal with speed and time left; nothing where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, desc=description, leave=False, disable=None, smoothing=0.1)


def save_picture(image, path, text=None):
    """Write a PNG whole or not at all; `text` goes into its metadata."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, str(value))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def side_by_side(original, picture):
    """(picture of both under a line that tells the PSNR, the PSNR in dB)"""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    difference = np.asarray(original, dtype=np.float64) - np.asarray(picture, dtype=np.float64)
    mse = np.mean(difference**2)
    psnr = 10 * np.log10(255**2 / mse) if mse else float("inf")
    width, height, line = picture.width, picture.height, 24
    both = Image.new("RGB", (2 * width + 8, height + line), "white")
    both.paste(original, (0, line))
    both.paste(picture, (width + 8, line))
    draw, font = ImageDraw.Draw(both), ImageFont.load_default(14)
    draw.text((4, 3), "original", fill="black", font=font)
    draw.text((width + 12, 3), f"PSNR {psnr:.2f} dB", fill="black", font=font)
    return both, psnr


def frame_paths(folder):
    """The pictures of a folder in the order of their names, numbers in them counted as numbers."""
    import re

    from PIL import Image

    if not Path(folder).is_dir():
        raise InputError(f"--video_path {folder}: give a folder of frames, pictures such as 000.png, 001.png")
    suffixes = Image.registered_extensions()
    paths = [p for p in Path(folder).iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    if not paths:
        raise InputError(f"--video_path {folder} holds no picture: give a folder of frames such as 000.png, 001.png")
    return sorted(paths, key=lambda p: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", p.name)])


def free_paths(folder, stem, count):
    """The next `count` paths stem_N.png that no earlier result has."""
    import re

    taken = [re.fullmatch(rf"{stem}_(\d+)\.png", p.name) for p in Path(folder).iterdir()]
    first = max((int(m[1]) + 1 for m in taken if m), default=0)
    return [Path(folder) / f"{stem}_{first + i}.png" for i in range(count)]


def write_stats(args, **stats):
    """--stats_json: seconds and counts as given, and the peak memory of the process, or of the card's."""
    if args.stats_json:
        stats = {k: round(v, 4) if isinstance(v, float) else v for k, v in stats.items()}
        stats["peak_memory_mb"] = round(peak_memory() / 2**20, 1)
        write_atomically(args.stats_json, json.dumps(stats, indent=2) + "\n")


def peak_memory():
    """Bytes: the card's peak where a card computes, else this process's."""
    import paddle

    if paddle.get_device() != "cpu":
        return paddle.device.cuda.max_memory_allocated()
    return peak_host_memory()


def wrote(paths):
    print("wrote " + ", ".join(map(str, paths)), flush=True)
