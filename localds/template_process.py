"""The caller's end of the process in which chat templates run."""

from __future__ import annotations

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final, cast

_MAX_REQUEST: Final = 16 << 20  # bytes
_MAX_REPLY: Final = 64 << 20  # bytes
_MEMORY_EXIT: Final = 77  # as in template_worker.py
_START_SECONDS: Final = 20.0  # a cold disk under load; far more than it ever takes
_LENGTH = struct.Struct("<I")
_WORKER = Path(__file__).with_name("template_worker.py")


class ProcessError(Exception):
    """The process did not answer: too slow, ended, or could not be started."""


class TemplateProcess:
    """A running worker. Not for use from several threads at once.

    After a `ProcessError`, or any exception that interrupts `ask`, it is dead: start another.
    """

    def __init__(self) -> None:
        """Start the process without waiting for it to be ready."""
        try:
            # Isolated, without the caller's working directory or environment; only the way to
            # jinja2. A session of its own: Ctrl-C in the terminal is the caller's business.
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", str(_WORKER), *_library_folders()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                env={key: os.environ[key] for key in _KEPT_VARIABLES if key in os.environ},
                start_new_session=True,
            )
        except OSError as error:
            raise ProcessError(f"its process cannot be started: {error}") from None
        self._requests = _unblocked(self._process.stdin)
        self._replies = _unblocked(self._process.stdout)
        self._ready = False

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send `request` and return the reply, which must arrive within `seconds`.

        The process's own start is not counted. Raises `ProcessError`, and `TypeError` or
        `ValueError` for what JSON cannot express.
        """
        data = json.dumps(request).encode()
        if len(data) > _MAX_REQUEST:
            raise ValueError(f"{len(data):,} bytes of text; at most {_MAX_REQUEST:,} are possible")
        try:
            if not self._ready:
                self._exchange(b"", time.monotonic() + _START_SECONDS)
                self._ready = True
            return self._exchange(_LENGTH.pack(len(data)) + data, time.monotonic() + seconds)
        except BaseException:
            # A half-read reply would be taken for the next one.
            self.close()
            raise

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def _exchange(self, data: bytes, deadline: float) -> dict[str, Any]:
        """Write `data` and read one frame, both at once, until `deadline`."""
        unsent = memoryview(data)
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            if unsent:
                selector.register(self._requests, selectors.EVENT_WRITE)
            while True:
                events = selector.select(max(deadline - time.monotonic(), 0))
                if not events:
                    raise ProcessError("it takes too long")
                ready = {key.fd for key, _ in events}
                if self._requests in ready:
                    unsent = unsent[self._send(unsent) :]
                    if not unsent:
                        selector.unregister(self._requests)
                if self._replies in ready:
                    received += self._receive()
                    if (reply := _parse(received)) is not None:
                        return reply

    def _send(self, data: memoryview) -> int:
        try:
            return os.write(self._requests, data[: 1 << 16])
        except BrokenPipeError:
            raise ProcessError(self._why_ended()) from None

    def _receive(self) -> bytes:
        data = os.read(self._replies, 1 << 20)
        if not data:
            raise ProcessError(self._why_ended())
        return data

    def _why_ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            return "it takes too long"
        if code == _MEMORY_EXIT:
            return "it needs too much memory"
        cause = f"signal {-code}" if code < 0 else f"status {code}"
        return f"its process ended unexpectedly ({cause})"


# What the dynamic linker and the clock need.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "TZDIR")


def _library_folders() -> list[str]:
    """The folders to import jinja2 and what it needs from."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ProcessError(f"the package {name} is not installed; run pip install {name}")
        folders.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(folders))


def _unblocked(pipe: IO[bytes] | None) -> int:
    """The descriptor of a pipe that `Popen` made, set not to block."""
    descriptor = cast("IO[bytes]", pipe).fileno()
    os.set_blocking(descriptor, False)
    return descriptor


def _parse(received: bytearray) -> dict[str, Any] | None:
    """The frame in `received`; None while it is incomplete."""
    if len(received) < _LENGTH.size:
        return None
    length = _LENGTH.unpack_from(received)[0]
    if length > _MAX_REPLY:
        raise ProcessError("it answers with too much text")
    if len(received) < _LENGTH.size + length:
        return None
    try:
        reply = json.loads(received[_LENGTH.size :])
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        raise ProcessError("it answers with something other than a reply")
    return reply
