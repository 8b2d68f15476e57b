# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rows ahead of the work, in groups for it, and back in their order."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor


def ahead(function, items, count, threads=1):
    """function(item) of each, in their order; threads compute up to `count` of them before they are asked for."""
    with ThreadPoolExecutor(threads, "emu3-rows") as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def groups(items, key, size, most):
    """Lists of up to `size` items of one key; an item whose key is None is one by itself.

    None waits for more than `most` items that come after it: then its group goes as it is.
    """
    waiting = {}  # key: (number of its first item, items), in the order of these numbers
    for number, item in enumerate(items):
        _, group = waiting.setdefault(key(item), (number, []))
        group.append(item)
        if key(item) is None or len(group) == size:
            yield waiting.pop(key(item))[1]
        for first, _ in list(waiting.values())[:1]:
            if number - first >= most:
                yield waiting.pop(next(iter(waiting)))[1]
    yield from (group for _, group in waiting.values())


def in_order(numbered):
    """(0, a), (2, c), (1, b) ... in any order -> a, b, c: each as soon as all before it have come."""
    early, number = {}, 0
    for i, item in numbered:
        early[i] = item
        while number in early:
            yield early.pop(number)
            number += 1
