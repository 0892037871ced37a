"""Ctrl-C between steps: an interrupt in the middle of one would leave scheduler and device of different minds."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeferredInterrupt:
    """Whether Ctrl-C was pressed; `check` raises KeyboardInterrupt if so."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        if self.requested:
            raise KeyboardInterrupt


@contextmanager
def deferred_interrupt() -> Iterator[DeferredInterrupt]:
    """Within, the first Ctrl-C is only noted; a second one interrupts at once. Only the main thread ever gets one."""
    deferred = DeferredInterrupt()
    if threading.current_thread() is not threading.main_thread():
        yield deferred
        return

    def note(signum, frame):
        if deferred.requested:
            raise KeyboardInterrupt
        deferred.requested = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield deferred
    finally:
        signal.signal(signal.SIGINT, previous)
