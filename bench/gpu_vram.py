"""What the driver says of an NVIDIA GPU's memory."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL_SECONDS = 0.2


def used_vram() -> int | None:
    """Bytes in use of the first GPU's memory, by all processes; None where nobody tells."""
    told = ask_driver("memory.used")
    return int(told) << 20 if told.isdecimal() else None


def ask_driver(what: str) -> str:
    """Of the first GPU, "" where there is no driver to ask."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "-i", "0", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


@contextmanager
def vram_watched() -> Iterator[list[int]]:
    """Gives the most bytes that were added to those in use before, known at the end."""
    before = used_vram()
    most: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL_SECONDS):
            used = used_vram()
            if used is not None and before is not None:
                most[:] = [max([*most, used - before])]

    watcher = threading.Thread(target=watch)
    if before is not None:
        watcher.start()
    try:
        yield most
    finally:
        ended.set()
        if before is not None:
            watcher.join()
