# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A forward pass as a CUDA graph: the card goes from kernel to kernel without waiting for the host to launch each."""

import logging

import paddle

from paddlemix.paddle_private import record_cuda_graph

WARM_UP = 2  # times with Paddle's operators first: tensors get their addresses, libraries their workspace

_may_record = True  # in this process


class Replayed:
    """Calls of one function. On a card the third one records its kernels; from then on the card repeats these.

    What changes from call to call must be in tensors of fixed shape and address, and nothing in it may wait for the
    card. Where recording fails, one line says so, and Paddle's operators go on: for good in this process, but where
    memory was out, until the next reset.
    """

    def __init__(self, may_record=True):
        self.may_record, self.calls, self.graph = may_record, 0, None

    def __call__(self, function):
        if self.calls == WARM_UP and self.may_record:
            self.graph = _recorded(function)
        if self.graph is None:
            function()
        else:
            self.graph.replay()
        self.calls += 1

    def reset(self):
        """Give up what is recorded. To be called before memory that it uses is given away."""
        if self.graph is not None:
            paddle.device.synchronize()
            self.graph.reset()
        self.calls, self.graph = 0, None


def _recorded(function):
    """The graph; None on a CPU, and where it cannot be."""
    global _may_record
    if not _may_record or not paddle.get_device().startswith("gpu"):
        return None
    try:
        return record_cuda_graph(function)
    except Exception as error:  # nothing was computed: whatever it is, Paddle's operators can do without
        # after some errors Paddle refuses to begin once more; memory may be there the next time
        _may_record = isinstance(error, MemoryError)
        # the error that ended the recording is the context of the one that it could not be ended
        reason = f"{type(error.__context__ or error).__name__} {error.__context__ or error}"
        logging.getLogger(__name__).warning(
            "a forward pass cannot be recorded as a CUDA graph (%s): Paddle's operators go on one by one, slower",
            " ".join(reason.split())[:200],
        )
        return None
