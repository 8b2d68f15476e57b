# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the three commands share: their common arguments, quiet start, statistics and one-line errors."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from paddlemix.machine import available_cores, peak_memory
from paddlemix.paddle_private import set_num_threads
from paddlemix.utils import InputError, replacing, write_atomically

ROOT = Path(__file__).resolve().parents[3]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" tells nobody anything
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser(description, writes_pictures=True):
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    if writes_pictures:
        parser.add_argument("--output_dir", default=".", help="where results are written")
    parser.add_argument("--device", help="cpu, gpu or gpu:N (default: the GPU if Paddle has one)")
    parser.add_argument("--stats_json", metavar="FILE", help="write times, tokens and peak memory to this file")
    parser.add_argument("--verbose", action="store_true", help="show the notices of the libraries, too")
    return parser


def add_dtype(parser):
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16", "int8", "int4"],
        help="of the language model: int8 and int4 quantize its linear layers while they are read "
        "(default: bfloat16; of a quantized checkpoint, its own)",
    )


def add_model_paths(parser, default):
    parser.add_argument("--model_path", default=default, help="a directory, a hub name, or emu3-mini")
    parser.add_argument(
        "--vq_model_path",
        help="the vision tokenizer: a directory or a hub name (default: BAAI/Emu3-VisionTokenizer, or emu3-mini's own)",
    )


def run(parser, command):
    """Run a command. A user's mistake is one line on stderr and exit code 2; Ctrl-C exits with 130."""
    args = parser.parse_args()
    before = signal.signal(signal.SIGINT, _leave)
    try:
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
        _check_text(args)
        _check_outputs(args)
        _settle_models(args)
        _start_paddle(args)
        command(args)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on: not worth a message
        _drop_stdout()
        sys.exit(141)
    except (InputError, OSError) as error:
        sys.exit(_complain(f"error: {' '.join(str(error).split())}", 2))
    except KeyboardInterrupt as stop:
        sys.exit(_complain(f"\ninterrupted{': ' if stop.args else ''}{stop}", 130))
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*signal_and_frame):
    """Ctrl-C while libraries load, which would turn it into errors of their own, or swallow it."""
    _complain("\ninterrupted", 130)
    os._exit(130)


class Stopwatch:
    """`with Stopwatch() as watch:` then `watch.seconds`."""

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exception):
        self.seconds = time.perf_counter() - self.start


class Loading(Stopwatch):
    """A Stopwatch around what loads; after it Ctrl-C is a KeyboardInterrupt again."""

    def __exit__(self, *exception):
        super().__exit__()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def note(text):
    _complain(f"note: {text}", 0)


def _complain(text, code):
    print(text, file=sys.stderr, flush=True)
    return code


def say(text):
    """Print a line; where nobody reads on, go on without: the pictures matter more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop_stdout()


def _drop_stdout():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_text(args):
    """Bytes that are not UTF-8 come as surrogates, which no tokenizer and no PNG takes."""
    for name in ("prompt", "negative_prompt", "question", "chat_template"):
        value = getattr(args, name, None) or ""
        for text in [value] if isinstance(value, str) else value:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise InputError(f"--{name} {text!r} is not UTF-8: give it in UTF-8") from None


def _check_outputs(args):
    """Hours of work must not end in a folder that cannot be written."""
    folders = []
    if hasattr(args, "output_dir"):
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {args.output_dir} cannot be made: {error.strerror}") from None
        folders.append(args.output_dir)
    for name in ("stats_json", "preview"):
        file = getattr(args, name, None)
        if file and Path(file).exists() and not Path(file).is_file():
            raise InputError(f"--{name} {file} is no file: give the name of one")
        folders += [Path(file).parent] if file else []
    for folder in folders:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"cannot write into {folder}: give a folder that exists and that you may write to")


def _settle_models(args):
    """The vision tokenizer where none is named, and what emu3-mini means where a folder has that name, too."""
    from paddlemix.models.emu3.hub import MINI, matching_vision_tokenizer

    if getattr(args, "vq_model_path", "") is None:
        args.vq_model_path = matching_vision_tokenizer(args.model_path)
    if args.model_path == MINI and Path(MINI).exists():
        note(f"{MINI} is the checkpoint that comes with the package; the folder of that name here is ./{MINI}")


def _start_paddle(args):
    if not args.verbose:
        import logging
        import warnings

        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("GLOG_minloglevel", "2")
    threads_are_chosen = "OMP_NUM_THREADS" in os.environ  # Paddle's import sets it to 1
    import paddle

    paddle.disable_signal_handler()  # it prints a C++ traceback when the process is asked to end
    if not threads_are_chosen:
        set_num_threads(available_cores())
    try:
        paddle.set_device(args.device or ("gpu" if paddle.device.cuda.device_count() else "cpu"))
    except (ValueError, RuntimeError):
        raise InputError(
            f"--device {args.device}: accepted are cpu, and gpu or gpu:N where Paddle finds a card; this Paddle is "
            f"{'a CUDA' if paddle.is_compiled_with_cuda() else 'a CPU'} build with "
            f"{paddle.device.cuda.device_count()} cards"
        ) from None


def usable_dtype(dtype, quantized):
    """`dtype`; where none is given that of a quantized checkpoint, or bfloat16. A CPU takes float32 for float16."""
    import paddle

    from paddlemix.external_ops import operators

    dtype, on_cpu = dtype or quantized or "bfloat16", paddle.get_device() == "cpu"
    if on_cpu and dtype == "float16":
        note("there is no float16 linear layer for a CPU: going on in float32")
        dtype = "float32"
    if on_cpu and operators() is None:
        other = "" if dtype == "float32" else ", or take --dtype=float32"
        note(f"{dtype} is slow on a CPU without the compiled operators: run `make ops`{other}")
    return dtype


def load_language_model(args, tokenizer):
    from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM

    dtype = usable_dtype(args.dtype, Emu3Config.from_pretrained(args.model_path).quantized_dtype)
    model = Emu3ForCausalLM.from_pretrained(args.model_path, dtype=dtype)
    if model.config.vocab_size < len(tokenizer):
        raise InputError(
            f"{args.model_path} has {len(tokenizer)} tokens and a model of {model.config.vocab_size}: "
            "the tokenizer's files are another checkpoint's"
        )
    return model


def load_pictures(paths, image_processor):
    """PIL pictures of files, each of a shape that can be encoded; InputError names the file that is not."""
    from paddlemix.processors.image_processing_emu3 import load_image

    images = []
    for path in paths:
        images.append(load_image(find_file(path)))
        try:
            image_processor(images[-1])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return images


def find_file(path):
    """`path`, or the project's own file of that name where a command runs in another folder."""
    return path if Path(path).exists() or not (ROOT / path).exists() else ROOT / path


def progress_bar(total, unit, description, initial=0):
    """A bar on the terminal with speed and time left; nothing where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total, initial=initial, unit=unit, desc=description, leave=False, disable=None, smoothing=0.1
    )  # fmt: skip


def save_picture(image, path, text=None):
    """Write a PNG whole or not at all; `text` goes into its metadata."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, str(value))
    try:
        with replacing(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}: give another --output_dir") from None


class Preview:
    """Rewrites a file with the pictures so far, side by side, grey where nothing is drawn yet.

    It takes a tenth of the time at most: where decoding is slow, some rows pass without.
    """

    def __init__(self, path, processor, sizes):
        self.path, self.processor, self.sizes, self.next = path, processor, sizes, 0.0

    def update(self, drawn):
        """drawn: int64 [pictures, positions], as generate_images tells it."""
        from PIL import Image

        started = time.monotonic()
        if started < self.next:
            return
        self.next = float("inf")  # whoever interrupts this one wants no other
        factor, grammar, pictures = self.processor.vision_tokenizer.spatial_scale_factor, self.processor.grammar, []
        for ids, (h, w) in zip(drawn, self.sizes, strict=True):
            pictures.append(Image.new("RGB", (w * factor, h * factor), "grey"))
            rows = grammar.whole_rows(ids, h, w)
            if len(rows):
                pictures[-1].paste(self.processor.decode_image(rows), (0, 0))
        try:
            self.show(pictures)
        except InputError:
            note(f"cannot write {self.path}: drawing on without a preview")
            return
        now = time.monotonic()
        self.next = now + 9 * (now - started)

    def show(self, pictures):
        from PIL import Image

        both = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
        left = 0
        for picture in pictures:
            both.paste(picture, (left, 0))
            left += picture.width
        save_picture(both, self.path)


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
    draw.text((width + 12, 3), f"reconstruction, PSNR {psnr:.2f} dB", fill="black", font=font)
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


def free_paths(folder, stem, count, own=None):
    """The next `count` paths stem_N.png that no earlier result has, and no unfinished one but `own`."""
    import re

    names = [p.name for p in Path(folder).iterdir() if p != own]
    taken = [re.fullmatch(rf"{stem}_(\d+)\.(png|tokens\.npz)", name) for name in names]
    first = max((int(m[1]) + 1 for m in taken if m), default=0)
    return [Path(folder) / f"{stem}_{first + i}.png" for i in range(count)]


def write_stats(args, **stats):
    """--stats_json: seconds and counts as given, and the peak memory of the process, or of the card's."""
    if args.stats_json:
        stats = {k: round(v, 4) if isinstance(v, float) else v for k, v in stats.items()}
        stats["peak_memory_mb"] = round(peak_memory() / 2**20, 1)
        write_atomically(args.stats_json, json.dumps(stats, indent=2) + "\n")


def wrote(paths):
    say("wrote " + ", ".join(map(str, paths)))
