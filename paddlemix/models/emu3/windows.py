# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How many tokens a forward pass guesses: what a window gains, beside what the larger pass costs.

Both tables are measured: `benchmarks/bench.py speculation` prints them.
"""

import numpy as np

WINDOW = 15  # where a pass of many rows costs what one of few does: twice as many save a tenth of the passes more
WINDOWS = (0, 1, 2, 3, 5, 7, 15)
GAINS = (1.0, 1.37, 1.67, 1.94, 2.3, 2.59, 3.2)  # tokens of a picture that a pass gives, of Emu3-Mini
ROWS = (2, 4, 6, 8, 12, 16, 64)
COSTS = {  # time of a pass on a CPU with so many rows, beside one of two, by dtype of the weights; 64 by the products
    "float32": (1, 1.2, 1.2, 1.45, 1.65, 2.1, 8),
    "bfloat16": (1, 1.2, 1.6, 1.95, 2.6, 3.4, 13),
    "int8": (1, 1.3, 1.7, 2.2, 3.15, 4.25, 17),
    "int4": (1, 1.6, 2.15, 2.8, 4, 5.3, 21),
}
WITHOUT_OPERATORS = (1, 2, 3, 4, 6, 8, 32)
WORTH = 1.05  # a window must promise more than this beside sequential decoding


def expected_gain(window, luck):
    """Tokens that a pass gives. luck: what a picture gained up to now beside the table; 1 is as much."""
    return 1 + luck * (np.interp(window, WINDOWS, GAINS) - 1)


def choose_window(decoding, window, rows, costs, luck=1.0):
    """How many tokens a pass guesses; 0 is sequential decoding.

    Args:
        decoding, window: as Batch takes them.
        rows: of the pass, each with one token.
        costs: of COSTS; None where more rows cost hardly anything.
        luck: the mean of the sequences'.
    """
    if decoding == "step":
        return 0
    if decoding == "jacobi" or costs is None:
        return window or WINDOW

    def speed(guesses):
        return expected_gain(guesses, luck) / np.interp(rows * (1 + guesses), ROWS, costs)

    best = max((w for w in WINDOWS if not w or rows * (1 + w) <= ROWS[-1]), key=speed)
    return best if speed(best) > WORTH * speed(0) else 0
