"""The picker of models: which to load, what to download, and what to remove."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from textual import on, work
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.events import DescendantFocus
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from localds.units import format_size
from tui.literal import literal
from tui.model_download import Download
from tui.model_fit import Conditions, measure_speed
from tui.model_removal import carry_out, plan_for, question
from tui.screens.dialogs import Confirm
from tui.widgets.download_bar import DownloadBar
from tui.widgets.offer_browser import OfferBrowser

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

    from localds.catalog.remove import Removal
    from tui.models_on_offer import Offer

_POLL_SECONDS = 0.2
_SEARCHING = "Looking at the models on this machine …"
_KEYS = ("load", "download", "stop", "remove", "measure", "move", "filter", "close")


@dataclass(frozen=True, slots=True)
class Choice:
    """The model that was chosen: what `localds.load` takes, and what to call it."""

    name_or_path: str
    title: str


class ModelsScreen(ModalScreen[Choice | None]):
    """Chooses a model; None where it was closed without a choice.

    `current` is the one in use, by its name or path. `context` in tokens and `ram` are what the
    next model will be loaded with; `freed` are bytes that the one in use gives back before.
    """

    CSS_PATH = "models.tcss"
    AUTO_FOCUS = "LiteralInput"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (160, "-wide")]  # noqa: RUF012  Textual's own type
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close"),
        Binding("d", "download", "Download"),
        Binding("x,delete", "remove", "Remove"),
        Binding("s", "measure", "Measure the speed"),
        Binding("c", "stop", "Stop the download"),
        Binding("slash", "filter", "Filter"),
        Binding("up", "move('up')", "Up", show=False),
        Binding("down", "move('down')", "Down", show=False),
        Binding("pageup", "move('page_up')", "Page up", show=False),
        Binding("pagedown", "move('page_down')", "Page down", show=False),
    ]

    @dataclass
    class Planned(Message):
        """What would be removed of a model."""

        offer: Offer
        removal: Removal

    @dataclass
    class Ended(Message):
        """What was done on a thread ended: with this to tell, and perhaps with other models."""

        text: str
        failed: bool = False

    def __init__(
        self,
        current: str | None = None,
        context: int | None = None,
        ram: str | None = None,
        *,
        freed: int = 0,
    ) -> None:
        super().__init__()
        self._current = current
        self._conditions = Conditions(context, ram, freed)
        self._download: Download | None = None
        self._coming: Offer | None = None  # what is downloaded
        self._then_load = False

    def compose(self) -> ComposeResult:
        """The list; below it the download, a message, and the keys."""
        with Vertical(id="models"):
            yield Static("Models", id="models-title", markup=False)
            yield OfferBrowser(self._current, self._conditions, id="models-browser")
            yield DownloadBar(id="models-download")
            yield Static(id="models-status", markup=False)
            with Horizontal(id="models-keys"):
                for action in _KEYS:
                    button = Button("", id=f"models-key-{action}", compact=True)
                    button.can_focus = False
                    yield button

    def on_mount(self) -> None:
        """Begin to look for models."""
        self._timer = self.set_interval(_POLL_SECONDS, self._poll, pause=True)
        self._tell(_SEARCHING)
        self._browser.look()
        self._update_keys()

    def on_unmount(self) -> None:
        """A download ends with the screen; what came is kept."""
        if self._download:
            self._download.stop()

    @property
    def _browser(self) -> OfferBrowser:
        return self.query_one(OfferBrowser)

    @on(OfferBrowser.Listed)
    def _listed(self, event: OfferBrowser.Listed) -> None:
        if event.error:
            self._tell(event.error, error=True)
        elif self._told == _SEARCHING:
            self._tell("")

    def action_filter(self) -> None:
        """Go to the filter."""
        self._browser.focus_filter()

    def action_move(self, where: Literal["up", "down", "page_up", "page_down"]) -> None:
        """Move in the table from wherever the focus is."""
        self._browser.move(where)

    # Load

    @on(OfferBrowser.Chosen)
    def action_load(self) -> None:
        """Close with the model under the cursor; download it before where that is needed."""
        offer = self._browser.offer
        if offer is None:
            return
        if offer.can_load:
            self._leave(Choice(offer.name_or_path, offer.label))
        elif offer.can_download:
            self._start_download(offer, then_load=True)
        else:
            self._tell(offer.fit.text, error=True)

    def action_close(self) -> None:
        """Close without a choice."""
        self._leave(None)

    def _leave(self, choice: Choice | None) -> None:
        """Close; where a download is going on, ask before."""
        if self._coming is None or (self._download and self._download.stopping):
            self.dismiss(choice)
            return

        def answer(stop: bool | None) -> None:
            if stop:
                self.dismiss(choice)

        text = f"Stop the download of {self._coming.label}?\nWhat came is kept for the next time."
        self.app.push_screen(Confirm(text, yes="Stop it", no="Go on"), answer)

    # Download

    def action_download(self) -> None:
        """Download the model under the cursor, or go on with it."""
        offer = self._browser.offer
        if offer is None:
            return
        if offer.can_download:
            self._start_download(offer, then_load=False)
        else:
            self._tell(f"{offer.label} is on this machine already.")

    def action_stop(self) -> None:
        """Stop the download; what came is kept."""
        if self._download:
            self._then_load = False
            self._download.stop()
            self._poll()

    def _start_download(self, offer: Offer, *, then_load: bool) -> None:
        if self._coming is not None:
            self._tell(f"{self._coming.label} is being downloaded; c in the table stops that.")
            return
        self._coming, self._then_load = offer, then_load
        self._download = Download(offer.name)
        self._download.start()
        self._timer.resume()
        self._tell("")
        self._browser.focus_table()
        self._poll()

    def _poll(self) -> None:
        """Show how far the download is, and see to its end."""
        download, offer = self._download, self._coming
        if download is None or offer is None:
            return
        bar = self.query_one(DownloadBar)
        running = download.running
        bar.set_class(running, "-shown")
        if running:
            bar.show(offer.label, download.read(), stopping=download.stopping)
        elif self.is_current:  # not below a question, whose answer closes
            self._finish(download, offer)
        self._update_keys()

    def _finish(self, download: Download, offer: Offer) -> None:
        self._timer.pause()
        self._download = self._coming = None
        if download.state == "failed":
            self._tell(download.error, error=True)
        elif download.state == "stopped":
            self._tell(f"{offer.label}: stopped; d goes on where it was.")
        elif self._then_load:
            self.dismiss(Choice(offer.name, offer.label))
            return
        else:
            self._tell(f"{offer.label} is installed; Enter loads it.")
        self._browser.look()

    # Remove

    def action_remove(self) -> None:
        """Remove the model under the cursor, after asking."""
        offer = self._browser.offer
        if offer is None:
            return
        objection = self._objection(offer)
        if objection:
            self._tell(objection)
        else:
            self._plan_removal(offer)

    def _objection(self, offer: Offer) -> str:
        """Why a model cannot be removed, empty where it can."""
        if self._current is not None and offer.is_called(self._current):
            return f"{offer.label} is in use; load another model before you remove it."
        if self._coming is not None and self._coming.repository == offer.repository:
            return f"{self._coming.label} is being downloaded; stop that before you remove anything"
        if offer.can_remove:
            return ""
        return {
            "built-in": "The built-in guide is a part of localds and stays.",
            "not installed": f"{offer.label} is not on this machine.",
        }.get(offer.state, "localds removes what it downloaded only; remove this file yourself.")

    @work(thread=True, exclusive=True, group="removal")
    def _plan_removal(self, offer: Offer) -> None:
        try:
            self.post_message(self.Planned(offer, plan_for(offer)))
        except (ValueError, OSError) as error:
            self.post_message(self.Ended(str(error), failed=True))

    @on(Planned)
    def _ask_to_remove(self, event: Planned) -> None:
        def answer(yes: bool | None) -> None:
            if yes:
                self._remove(event.offer, event.removal)

        self.app.push_screen(Confirm(question(event.offer, event.removal), yes="Remove"), answer)

    @work(thread=True, group="removal")
    def _remove(self, offer: Offer, removal: Removal) -> None:
        try:
            carry_out(offer, removal)
        except (ValueError, OSError) as error:
            self.post_message(self.Ended(str(error), failed=True))
        else:
            size = format_size(removal.size)
            self.post_message(self.Ended(f"Removed {offer.label}; {size} are free again."))

    # Speed

    def action_measure(self) -> None:
        """Measure how fast the model under the cursor would run, if part of it is on disk."""
        offer = self._browser.offer
        if offer and _can_measure(offer):
            self._tell("Measuring memory and disk, about two seconds …")
            self._measure(offer)

    @work(thread=True, exclusive=True, group="speed")
    def _measure(self, offer: Offer) -> None:
        if offer.path is None:
            return
        try:
            measure_speed(offer.path, self._conditions)
        except (ValueError, OSError) as error:
            self.post_message(self.Ended(str(error), failed=True))
        else:
            self.post_message(self.Ended(""))

    # What is told

    @on(Ended)
    def _ended(self, event: Ended) -> None:
        self._tell(event.text, error=event.failed)
        self._browser.look()

    def _tell(self, text: str, *, error: bool = False) -> None:
        self._told = text
        status = self.query_one("#models-status", Static)
        status.update(Content(literal(f"! {text}" if error else text)))
        status.set_class(bool(text), "-shown")
        status.set_class(error, "-error")

    @on(OfferBrowser.Highlighted)
    def _update_keys(self) -> None:
        """Show what can be done with the model under the cursor."""
        offer, busy, typing = self._browser.offer, self._coming is not None, self._browser.typing
        coming = offer is not None and offer.can_download and not busy
        labels = {
            "load": ("Enter", "Load" if offer and offer.can_load else ""),
            "download": ("d", "Download" if coming else ""),
            "stop": ("c", "Stop the download" if busy else ""),
            "remove": ("x", "Remove" if offer and not self._objection(offer) else ""),
            "measure": ("s", "Measure speed" if offer and _can_measure(offer) else ""),
            "move": ("Down", "List" if typing else ""),
            "filter": ("/", "" if typing else "Filter"),
            "close": ("Esc", "Close"),
        }
        if coming:
            labels["load"] = ("Enter", "Download and load")
        for action, (key, text) in labels.items():
            button = self.query_one(f"#models-key-{action}", Button)
            # In the filter a letter is a letter.
            shown = "" if typing and len(key) == 1 else f" {key}"
            button.label = Content(text) + Content.styled(shown, "dim")
            button.set_class(bool(text), "-shown")
            button.refresh(layout=True)

    @on(DescendantFocus)
    def _focus_moved(self) -> None:
        self._update_keys()

    @on(Button.Pressed)
    async def _pressed(self, event: Button.Pressed) -> None:
        action = (event.button.id or "").removeprefix("models-key-")
        await self.run_action("move('down')" if action == "move" else action)


def _can_measure(offer: Offer) -> bool:
    return offer.can_load and offer.fit.kind == "from disk"
