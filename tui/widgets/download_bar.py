"""How far a download is, in two or three lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.content import Content
from textual.widgets import Static

from localds.units import format_size
from tui.literal import literal

if TYPE_CHECKING:
    from tui.download_meter import Reading

_WIDEST = 60
_FULL, _EMPTY = "█", "░"


class DownloadBar(Static):
    """Shows a reading of a download: a bar, bytes, speed and the time left."""

    DEFAULT_CSS = """
    DownloadBar {
        height: auto;
        color: $text;
        & > .bar { color: $primary; }
    }
    """

    def __init__(self, *, id: str) -> None:  # noqa: A002  as Textual calls it
        super().__init__(id=id, markup=False)

    def show(self, label: str, reading: Reading | None, *, stopping: bool) -> None:
        """Show how far the download of `label` is; no reading while the hub is asked."""
        if stopping:
            heading = f"Stopping the download of {label}; what came is kept"
        elif reading is None:
            heading = f"Asking the hub for {label}"
        elif reading.to_check:
            heading = f"Checking what is here of {label}"
        else:
            heading = f"Downloading {label}"
        lines = [Content.styled(literal(heading), "bold")]
        if reading is not None:
            lines.append(self._figures(reading))
            if reading.note:
                lines.append(Content(literal(reading.note)))
        self.update(Content("\n").join(lines))

    def _figures(self, reading: Reading) -> Content:
        if reading.to_check:
            return self._bar(reading.checked / reading.to_check, format_size(reading.to_check))
        parts = [f"{format_size(reading.done)} of {format_size(reading.total)}"]
        if reading.speed:
            parts.append(f"{format_size(reading.speed)}/s")
        if reading.seconds_left is not None and reading.done < reading.total:
            parts.append(f"{format_duration(reading.seconds_left)} left")
        return self._bar(reading.share, " · ".join(parts))

    def _bar(self, share: float, text: str) -> Content:
        """A bar and what it stands for, as wide as the widget."""
        percent = f" {int(100 * share):>3}%  "
        width = self.content_size.width or 78
        room = max(min(width - len(percent) - len(text), _WIDEST), 4)
        full = int(share * room)
        bar = Content.styled(_FULL * full + _EMPTY * (room - full), "$primary")
        return bar + Content(percent + text)


def format_duration(seconds: float) -> str:
    """A time as people say it: "45 s", "12 min", "2 h 5 min"."""
    if seconds < 60:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"{hours}{minutes % 60} min"
