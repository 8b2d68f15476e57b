# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the machine has, of the CPU and of a card: cores, free memory, what was used of it; and a quiet start on it."""

import contextlib
import logging
import os
import re
import reprlib
import sys
import warnings
from pathlib import Path

from paddlemix.paddle_private import free_card_memory, set_num_threads, use_full_float32
from paddlemix.utils import InputError

MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20  # glibc's name of mallopt's option; bytes


class NotEnoughMemory(InputError):
    """What was asked for does not fit into the memory that is free now."""


class RankLost(InputError):
    """One of several processes has ended, or failed where another one cannot know: the others cannot go on."""


def start_paddle(device=None, quiet=True):
    """Import Paddle without its notices, with all cores, on a device.

    Args:
        device: what --device gave: "cpu", "gpu" or "gpu:N"; None is the GPU where Paddle finds one, and for a library
            the device that Paddle is set to where it was imported before.
        quiet: show no notices and warnings of the libraries from now on, either: for a program, not for a library.

    Returns:
        notes for the user, lines.

    Raises:
        InputError: there is no such device, or OMP_NUM_THREADS is not a number of threads.
    """
    if quiet:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        logging.getLogger("PIL").propagate = False  # it logs of a damaged picture what the error says
        os.environ.setdefault("GLOG_minloglevel", "2")
    was_imported = "paddle" in sys.modules
    threads, notes = (None, []) if was_imported else _asked_threads()
    threads_are_chosen = "OMP_NUM_THREADS" in os.environ  # Paddle's import sets it to 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paddle

    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the programs that this one starts
    if was_imported and device is None and not quiet:
        return notes
    paddle.disable_signal_handler()  # it prints a C++ traceback when the process is asked to end
    if threads or not threads_are_chosen:
        set_num_threads(threads or available_cores())
    cards = paddle.device.cuda.device_count()
    device = ("gpu" if cards else "cpu") if device is None else str(device)
    number = re.fullmatch(r"gpu(?::(\d+))?", device)
    if device != "cpu" and not (number and int(number[1] or 0) < cards):  # Paddle ends the process for a wrong number
        raise InputError(
            f"device {device!r}: accepted are cpu, and gpu or gpu:N where Paddle finds a card; this Paddle is "
            f"{'a CUDA' if paddle.is_compiled_with_cuda() else 'a CPU'} build with {cards} cards"
        )
    paddle.set_device(device)
    if device != "cpu":
        use_full_float32()
    return notes


def _asked_threads():
    """(threads that OMP_NUM_THREADS asks for or None, notes), before Paddle's import, to which it is made harmless."""
    text = os.environ.get("OMP_NUM_THREADS")
    if not (text or "").strip():
        os.environ.pop("OMP_NUM_THREADS", None)  # OpenMP complains of ""
        return None, []
    try:
        asked = int(text.split(",")[0])  # of a list the first is the outermost level
    except ValueError:
        asked = 0
    cores = available_cores()
    if asked < 1:
        raise InputError(
            f"OMP_NUM_THREADS is {reprlib.repr(text)}: give a number of threads from 1 to {cores}, or unset it"
        )
    threads = min(asked, cores)
    # a list, which OpenMP reads, and of which Paddle does not warn as it does of a number above 1
    os.environ["OMP_NUM_THREADS"] = f"{threads},1"
    reason = f"OMP_NUM_THREADS is {reprlib.repr(text)}, this process has {cores} cores: going on with {threads} threads"
    return threads, [reason] if asked > cores else []


def available_memory():
    """Bytes of memory that a model can still take: the machine's, or the container's where that is less."""
    import psutil

    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return free
        used = int((group / "memory.current").read_text())
        # files that were read are counted as used, and are given up when a program asks for memory
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(counts["inactive_file"]) + int(counts["active_file"])
        return min(free, int(limit) - used)
    except (OSError, ValueError, KeyError):
        return free


def free_memory():
    """Bytes that a model can still take on the device."""
    import paddle

    if paddle.get_device() == "cpu":
        return available_memory()
    kept = paddle.device.cuda.memory_reserved() - paddle.device.cuda.memory_allocated()  # by Paddle, for what comes
    return free_card_memory() + kept


def release_memory():
    """Give a card's memory that Paddle keeps for what comes back to the device; on a CPU nothing is kept."""
    import paddle

    if paddle.get_device() != "cpu":
        paddle.device.cuda.empty_cache()


def return_freed_memory():
    """Let malloc give large blocks back to the system as soon as they are freed. Else what a layer frees in training
    leaves holes between what is kept, which the next layer does not fit into: several GB for large models (glibc)."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BLOCK)


def with_memory_released(function, *arguments):
    """function(*arguments); where a card's memory is out, once more with what Paddle kept of it given back."""
    import paddle

    try:
        return function(*arguments)
    except MemoryError:
        if paddle.get_device() == "cpu":
            raise
    release_memory()  # here, where no traceback holds tensors any more
    return function(*arguments)


def half_dtype():
    """The 16-bit dtype of the device: "float16" on a card that has no bfloat16 (compute capability below 8.0)."""
    import paddle

    on_card = paddle.get_device() != "cpu"
    return "float16" if on_card and paddle.device.cuda.get_device_capability() < (8, 0) else "bfloat16"


def require_memory(size, purpose):
    """NotEnoughMemory, an InputError, where the device has less than `size` bytes free."""
    import paddle

    free = free_memory()
    if size > free:
        place = "memory" if paddle.get_device() == "cpu" else "memory on the card"
        raise NotEnoughMemory(
            f"{size / 1e9:.1f} GB of {place} {purpose} are needed and {free / 1e9:.1f} GB are free: close other "
            "programs, use a machine with more, or take a smaller dtype where the device has one"
        )


def peak_memory():
    """Bytes: the card's peak where a card computes, else this process's."""
    import paddle

    if paddle.get_device() != "cpu":
        return paddle.device.cuda.max_memory_allocated()
    return peak_host_memory()


def peak_host_memory():
    """Bytes that this process had in memory at most."""
    try:  # on Linux: getrusage gives the parent's peak where that was higher
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_cores():
    """Cores that this process may use: its affinity, less where the container's quota is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
