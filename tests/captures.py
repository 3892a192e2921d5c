"""What stands for CUDA where captures are tested without a device."""

from __future__ import annotations

import gc
from contextlib import contextmanager, nullcontext

import torch

NO_LUCK = RuntimeError("CUDA: no luck")
# As torch, the builder and Triton word it.
DISTURBED = [
    RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for `cudaErrorStreamCapture..."),
    RuntimeError("CUDA: end capture: operation failed due to a previous error during capture"),
    RuntimeError("the capture was invalidated: something recorded in it is not allowed in a graph"),
    RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
    RuntimeError("cudaErrorStreamCaptureInvalidated"),
]


class Stream:
    device = torch.device("cpu")

    def synchronize(self):
        pass


class Builder:
    """Keeps what is asked of it, in order."""

    def __init__(self):
        self.calls, self.capturing = [], False

    @contextmanager
    def rehearse(self, stream):
        self.calls.append("rehearse")
        yield

    @contextmanager
    def capture(self, stream):
        self.calls.append("capture")
        assert not gc.isenabled(), "a collection may come while a stream is captured"
        self.capturing = True
        yield
        self.capturing = False

    def when(self, flag):
        return nullcontext()

    def instantiate(self):
        self.calls.append("instantiate")
        return "a graph"

    def abort(self):
        self.calls.append("abort")

    def close(self):
        self.calls.append("close")


class Others:
    """Other threads, which allocate something in each of the next ``busy`` captures."""

    busy, asked = 0, 0

    def meddle(self, builder):
        if builder.capturing and self.busy > 0:
            self.asked += 1
            self.busy -= 1
