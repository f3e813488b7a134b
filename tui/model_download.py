"""A download of a known model, beside the app.

It runs on a daemon thread, not on a worker of the app: workers are waited for when the app ends,
and a hub that does not answer would keep it from ending. What came is kept at any moment.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Literal

from tui.unfinished import forget_download, note_download

if TYPE_CHECKING:
    from tui.download_meter import Meter, Reading

# What errors of downloads, which are commands' too, say to do, and what it is here.
_COMMAND, _HERE = "run the same command again", "download it again (d)"


class Download:
    """One download by the `name` of a model, from `start` to one of its ends.

    Read from the app's thread: `state`, `error` where that is "failed", and `read()`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Literal["running", "done", "stopped", "failed"] = "running"
        self.error = ""
        self._crash: BaseException | None = None
        self._stop = threading.Event()
        self._meter: Meter | None = None
        self._thread = threading.Thread(target=self._run, name=f"download {name}", daemon=True)

    @property
    def running(self) -> bool:
        """Whether it has not ended. Raises what a mistake in the program raised."""
        if self._crash is not None:
            raise self._crash
        return self.state == "running"

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stop.is_set()

    def start(self) -> None:
        """Begin, or go on with what came earlier."""
        self._thread.start()

    def stop(self) -> None:
        """End it soon: with the next bytes, or when the hub has not sent any for 10 seconds."""
        self._stop.set()

    def read(self) -> Reading | None:
        """How far it is; None while the hub is asked what there is."""
        return self._meter.read() if self._meter else None

    def _run(self) -> None:
        try:
            self._download()
        except (ValueError, OSError) as error:
            self.error = str(error).replace(_COMMAND, _HERE)
            self.state = "stopped" if self.stopping else "failed"
        except BaseException as error:  # the app's thread raises it
            self._crash = error

    def _download(self) -> None:
        from localds.catalog.names import parse
        from localds.catalog.pull import fetch, plan
        from tui.download_meter import Meter, StoppedError

        meter = Meter(self._stop)
        try:
            pull = plan(parse(self.name))
            meter.begin(pull.size, pull.size - pull.missing)
            note_download(self.name, pull)
            self._meter = meter
            fetch(pull, meter)
        except StoppedError:
            self.state = "stopped"
        else:
            forget_download(self.name)
            self.state = "done"
