# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What every command needs of the terminal: parser, lines, progress bar, signals, errors of one line."""

import argparse
import contextlib
import errno
import os
import re
import reprlib
import signal
import sys
import time
from difflib import get_close_matches
from pathlib import Path

from paddlemix.machine import start_paddle
from paddlemix.utils import InputError

READER_IS_GONE = (errno.EPIPE, errno.EBADF)  # of a pipe, or closed from the start: nobody waits for what is printed
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DEVICE_HELP = "cpu, gpu or gpu:N (default: the GPU if Paddle has one)"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" helps nobody
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Mistakes are an InputError of one line, where argparse prints the usage of all options."""

    def print_help(self, file=None):
        print_result(self.format_help(), end="")  # argparse drops what it cannot print

    def parse_known_args(self, args=None, namespace=None):  # which a parser of subcommands calls for each
        args, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = re.findall(r"--\w+", self.format_usage())
            near = get_close_matches(unknown[0].split("=")[0], options, 1)
            advice = f"did you mean {near[0]}?" if near else "--help lists what is accepted"
            raise InputError(f"unknown argument {reprlib.repr(unknown[0])}: {advice}")
        return args, unknown

    def error(self, message):
        message = message.removeprefix("argument ").replace("expected one argument", "a value is missing after it")
        raise InputError(message.replace("expected at least one argument", "at least one value is missing after it"))


def integer(text):
    """The type of an option that takes a whole number."""
    return _number(int, text, "a whole number, such as 64")


def number(text):
    return _number(float, text, "a number, such as 1.5")


def _number(kind, text, accepted):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not {accepted}") from None


def bare_parser(description, prog=None, verbose=True):
    """The parser of a command. `prog` is None for a script, whose name Python knows."""
    parser = _Parser(prog=prog, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    if verbose:
        parser.add_argument("--verbose", action="store_true", help="show the notices of the libraries")
    return parser


def add_tasks(parser, tasks):
    """The parsers of a command's tasks, {name: (description, function that adds arguments)}: `args.task` then."""
    kinds = parser.add_subparsers(
        dest="task", required=True, metavar="TASK", parser_class=lambda prog, **words: make_parser(
            words["description"], prog, writes_pictures=False
        ),
    )  # fmt: skip
    for name, (description, add_arguments) in tasks.items():
        add_arguments(kinds.add_parser(name, help=description, description=description))


def make_parser(description, prog=None, writes_pictures=True):
    """The parser of a command that computes."""
    parser = bare_parser(description, prog)
    if writes_pictures:
        parser.add_argument("--output_dir", default=".", help="where results are written")
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--stats_json", metavar="FILE", help="write times, tokens and peak memory to this file")
    return parser


def add_texts(parser, option, default, help, by_position):
    """An option of one or more texts, which `by_position` accepts without the option's name as well."""
    parser.add_argument(f"--{option}", nargs="+", default=default, help=help)
    if by_position:
        parser.add_argument("texts", nargs="*", metavar=option.upper(), help=f"the same as --{option}")
        parser.set_defaults(texts_of=option)


def run(parser, command, arguments=None):
    """Run a command. `arguments` are those of the process where None."""
    with errors_of_one_line(arguments is None):
        args = parser.parse_args(arguments)
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
        _settle_texts(args, parser)
        _check_outputs(args)
        _settle_models(args)
        for text in start_paddle(args.device, quiet=not args.verbose):
            note(text)
        try:
            command(args)
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            folder = next((v for v in map(vars(args).get, ("output_dir", "output_path", "output")) if v), "the disk")
            raise InputError(
                f"cannot write all into {folder} ({error.strerror}): make room there and give the same command again"
            ) from None


@contextlib.contextmanager
def errors_of_one_line(owns_process):
    """Around all that a command does. A user's mistake, and a result or a file that cannot be written, is one line on
    stderr and exit code 2; Ctrl-C exits with 130."""
    global _unprinted
    if owns_process:
        _keep_docstrings()
    _take_closed_streams()
    before, _unprinted = signal.signal(signal.SIGINT, _leave), None
    try:
        yield
        say("", end="")
        if _unprinted:
            raise InputError(f"all is done, but not all of it could be printed: {_unprinted}")
    except BrokenPipeError:  # nobody reads on: not worth a message
        sys.exit(141)
    except (InputError, OSError) as error:
        sys.exit(_complain(f"error: {_cut(' '.join(str(error).split()))}", 2))
    except MemoryError as error:
        sys.exit(_complain(f"error: {_out_of_memory(error)}", 2))
    except KeyboardInterrupt as stop:
        sys.exit(_complain(f"\ninterrupted{': ' if stop.args else ''}{stop}", 130))
    finally:
        for stream in (sys.stdout, sys.stderr):  # what libraries have printed, which Python's exit would fail to
            _print("", "", stream)
        signal.signal(signal.SIGINT, before)


def _keep_docstrings():
    """Start the process again without -OO, which takes away the docstrings that --help shows."""
    if sys.flags.optimize > 1:
        own = sys.orig_argv[1 : -len(sys.argv[1:]) or None]
        flags = [flag.replace("O", "") if re.fullmatch("-[a-zA-Z]*O[a-zA-Z]*", flag) else flag for flag in own]
        flags = [flag for flag in flags if flag != "-"]
        if flags != own or os.environ.get("PYTHONOPTIMIZE"):
            environment = {**os.environ, "PYTHONOPTIMIZE": ""}
            os.execve(sys.executable, [sys.executable, *flags, *sys.argv[1:]], environment)


def _take_closed_streams():
    """The number of a closed stream would be the next file's, and what libraries print would go into a picture: take
    it. Nothing can be written to stdout then, as before; what goes to stderr is dropped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", errors="replace"))


def _cut(text, most=700):
    """Long values are cut in the middle: what is accepted stands at the end."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _out_of_memory(error):
    """One line for an error of which Paddle writes many."""
    found = re.search(r"(Cannot allocate|Fail to alloc|Unable to allocate)[^,\n]*", str(error))
    wanted = f" ({found[0].strip()})" if found else ""
    return f"out of memory{wanted}: close other programs, or take fewer or smaller pictures, or a smaller --dtype"


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
    to_stderr(f"note: {text}")


def to_stderr(text):
    """Print a line that is not a result; where it cannot be printed nobody reads it."""
    _print(text, "\n", sys.stderr)


def _complain(text, code):
    to_stderr(text)
    return code


def print_result(text, end="\n"):
    """Print what was asked for: a command that cannot do so has failed."""
    error = _print(text, end, sys.stdout)
    if error:
        raise error if error.errno == errno.EPIPE else InputError(_reason(error))


def say(text, end="\n"):
    """Print a line about the work. Where that fails the work goes on: the pictures matter more. It is an error when the
    work is done, but where nobody reads stdout."""
    global _unprinted
    error = _print(text, end, sys.stdout)
    if error and error.errno not in READER_IS_GONE:
        _unprinted = _reason(error)


_unprinted = None  # why a line that `say` was given is lost


def _reason(error):
    return f"stdout {'is closed' if error.errno == errno.EBADF else f'cannot be written ({error.strerror})'}"


def _print(text, end, stream):
    """The OSError where it cannot be done; from then on the stream leads nowhere, also for Python's exit."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error


def progress_bar(total, unit, description, initial=0):
    """A bar on the terminal with speed and time left; nothing where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total, initial=initial, unit=unit, desc=description, leave=False, disable=None, smoothing=0.1
    )  # fmt: skip


def _settle_texts(args, parser):
    """Texts given without their option's name take its place, and all are of the bytes that were given, as UTF-8."""
    if hasattr(args, "texts") and not args.texts and getattr(args, args.texts_of) is parser.get_default(args.texts_of):
        _check_swallowed(args)
    if getattr(args, "texts", None):
        if getattr(args, args.texts_of) is not parser.get_default(args.texts_of):
            raise InputError(f"give {args.texts_of} once: {reprlib.repr(args.texts[0])}, or --{args.texts_of}")
        setattr(args, args.texts_of, args.texts)
    for name in ("prompt", "negative_prompt", "question", "chat_template"):
        value = getattr(args, name, None)
        if isinstance(value, list):
            setattr(args, name, [_in_utf_8(name, text) for text in value])
        elif value:
            setattr(args, name, _in_utf_8(name, value))


def _in_utf_8(name, text):
    """Bytes that are not of the locale's encoding, which may be ASCII, come as surrogates: no tokenizer and no PNG
    takes these."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeError:
            raise InputError(f"--{name} {reprlib.repr(text)} is not UTF-8: give it in UTF-8") from None


def _check_swallowed(args):
    """A text after an option of several values is taken for one more of them."""
    last = (getattr(args, "ratio", None) or [None])[-1]
    if last is not None and not re.fullmatch(r"[\d\s:.]+", last):
        name = "ratio"
    else:
        last = (getattr(args, "image_path", None) or [None])[-1]
        name = "image_path"
        if last is None or Path(last).suffix or Path(last).exists():
            return
    raise InputError(
        f"--{name} takes {reprlib.repr(last)} for one of its values: give the {args.texts_of} before the options, or "
        f"as --{args.texts_of}"
    )


def _check_outputs(args):
    """Hours of work must not end in a folder that cannot be written."""
    folders, files = [], []
    if getattr(args, "output_dir", None) is not None:
        check_folder("output_dir", args.output_dir)
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--output_dir {args.output_dir} cannot be made ({error.strerror}): give another"
            ) from None
    for name in ("stats_json", "preview"):
        file = getattr(args, name, None)
        if file and Path(file).exists() and not Path(file).is_file():
            raise InputError(f"--{name} {file} is not a file: give the name of one")
        if file and any(_is_stream(file, stream) for stream in (1, 2)):
            raise InputError(f"--{name} {file} is where this command prints to: give the name of another file")
        if file:  # what a link leads to is written
            files.append(Path(os.path.realpath(file)))
            folders.append(files[-1].parent)
    if len(set(files)) < len(files):
        raise InputError(f"--stats_json and --preview are one file, {args.preview}: give two")
    for folder in folders:
        _check_writable(folder)


def check_folder(option, path):
    """InputError: what the option names is no folder, cannot become one, or cannot be written into. None is made."""
    path = Path(path)
    there = next(one for one in (path, *path.absolute().parents) if os.path.exists(one))
    if not there.is_dir():
        raise InputError(f"--{option} {path} cannot be made (there is a file): give the name of a folder")
    _check_writable(there)


def _check_writable(folder):
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {folder}: give a folder that exists and that you may write to")


def _is_stream(path, descriptor):
    """Whether a path leads to the file of an open descriptor."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _settle_models(args):
    """The vision tokenizer where none is named, and a note on emu3-mini where a folder has that name."""
    from paddlemix.models.emu3.hub import MINI, matching_vision_tokenizer

    named = getattr(args, "model_path", None)
    if getattr(args, "vq_model_path", "") is None and named:
        args.vq_model_path = matching_vision_tokenizer(named)
    if MINI in (named, getattr(args, "vq_model_path", None)) and Path(MINI).exists():
        note(f"{MINI} is the checkpoint that comes with the package; the folder of that name here is ./{MINI}")
