# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the machine has: cores, free memory and what was used of it, of the CPU and of a card."""

import os
from pathlib import Path

from paddlemix.utils import InputError


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


def require_memory(size, purpose):
    """InputError where the device has less than `size` bytes free."""
    import paddle

    if paddle.get_device() == "cpu":
        free, place = available_memory(), "memory"
    else:
        card = paddle.device.cuda.get_device_properties()
        free, place = card.total_memory - paddle.device.cuda.memory_reserved(), "memory on the card"
    if size > free:
        raise InputError(
            f"{size / 1e9:.1f} GB of {place} {purpose} are needed and {free / 1e9:.1f} GB are free: close other "
            "programs, take a machine with more, or a dtype of fewer bits where the device has it"
        )


def peak_memory():
    """Bytes: the card's peak where a card computes, else this process's."""
    import paddle

    if paddle.get_device() != "cpu":
        return paddle.device.cuda.max_memory_allocated()
    return peak_host_memory()


def peak_host_memory():
    """Bytes that this process had in memory at most."""
    try:  # on Linux: getrusage tells the parent's peak where that was higher
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_cores():
    """Cores that this process may use: its affinity, less where the container's quota is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
