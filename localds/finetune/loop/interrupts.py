"""Ctrl-C while training: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """Turns SIGINT into a request that is heeded between batches, as is `event` once it is set.

    The signal is left alone outside the main thread and where a program handles it itself.
    """

    def __init__(self, event: threading.Event | None = None) -> None:
        self._event = event or threading.Event()
        self._installed = False
        self.twice = False

    def __enter__(self) -> Interrupts:
        self._installed = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._installed:
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._event.is_set():
            self.twice = True
            raise KeyboardInterrupt
        self._event.set()

    def check(self) -> None:
        """Raise `KeyboardInterrupt` where an end was asked for."""
        if self._event.is_set():
            raise KeyboardInterrupt
