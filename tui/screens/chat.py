"""The chat: conversations to the left, messages and prompt, what the machine does to the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.actions import SkipAction
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Static

from tui.chat import Chat
from tui.conversation import OpenConversation, stats_of
from tui.engine import Ended, Loaded, LoadFailed, Opened
from tui.literal import literal
from tui.plain import stats_line
from tui.progress import load_notice, progress_of
from tui.replying import Writer
from tui.screens.dialogs import AskText, ErrorDialog
from tui.slash import SlashCommands
from tui.store.error import StoreError
from tui.welcome import WELCOME, about
from tui.widgets.machine import MachinePanel
from tui.widgets.prompt import Prompt
from tui.widgets.sidebar import Sidebar
from tui.widgets.status import StatusLine
from tui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult

    from tui.app import ChatApp
    from tui.engine import Event
    from tui.store.conversations import ConversationStore
    from tui.store.records import Attachment

_DRAW_SECONDS = 1 / 10
_STATUS_SECONDS = 0.25
_PANEL_SECONDS = 1.0  # drawing it takes as long as a few tokens of a small model
_READING_SECONDS = 1.9  # the map of the experts costs most, and moves every other time
_IDLE_SECONDS = 2.0
_PANEL_FROM, _SIDEBAR_FROM = 120, 150  # columns, where these are shown unasked
_HISTORY = 200


class ChatScreen(Screen[None]):
    """Keys that work everywhere are bound here, those of a part in its widget."""

    CSS_PATH = "chat.tcss"
    AUTO_FOCUS = "Prompt TextArea"
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012  Textual's own type
        (0, "-narrow"),
        (100, "-normal"),
        (_SIDEBAR_FROM, "-wide"),
    ]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", show=False),
        Binding("ctrl+c", "interrupt", "Stop the reply", show=False, priority=True),
        Binding("f1", "help", "Help"),
        Binding("f2", "settings", "Settings"),
        Binding("ctrl+o", "models", "Model"),
        Binding("ctrl+n", "new", "New chat"),
        Binding("ctrl+b", "chats", "Chats"),
        Binding("ctrl+g", "machine", "Machine"),
        Binding("ctrl+up", "messages", "Messages"),
        Binding("ctrl+r", "regenerate", "Answer again", show=False),
        Binding("ctrl+t", "thinking", "Unfold thinking", show=False),
        Binding("ctrl+l", "copy_last", "Copy the last reply", show=False),
        Binding("ctrl+s", "continue", "Go on with a cut reply", show=False),
        Binding("pageup", "scroll(-1)", "Page up", show=False),
        Binding("pagedown", "scroll(1)", "Page down", show=False),
    ]
    app: ChatApp

    @dataclass
    class WriteFailed(Message):
        """A reply could not be saved."""

        text: str

    def __init__(self, store: ConversationStore) -> None:
        super().__init__()
        self.store = store
        self.writer = Writer(store, lambda text: self.post_message(self.WriteFailed(text)))
        self.commands = SlashCommands(self)
        self.chat: Chat
        self._list_shown: bool | None = None  # None: as there is room
        self._panel_shown: bool | None = None
        self._list_asked_last = False
        self._deleted: list[int] = []
        self._due: Callable[[], None] | None = None
        self._draft: tuple[str, tuple[Attachment, ...]] | None = None
        self._counter = 0

    # Layout

    def compose(self) -> ComposeResult:
        """Sidebar, chat, panel; below them the keys."""
        with Horizontal(id="body"):
            yield Sidebar(self.store, id="sidebar")
            with Vertical(id="chat"):
                yield Static(WELCOME, id="welcome", markup=False)
                yield Transcript(id="transcript")
                yield StatusLine(id="status")
                yield Prompt(id="prompt")
            yield MachinePanel(id="panel")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begin an empty chat."""
        app = self.app
        self.chat = Chat(
            self.store,
            app.engine,
            self.writer,
            self.transcript,
            layers=app.layers,
            title=lambda: app.loaded.title if app.loaded else "",
            sampling=app.launch.sampling,
        )
        self.prompt.commands = self.commands.all
        self.prompt.history = self._earlier_questions()
        self._counter = self.store.change_counter()
        self.set_interval(_DRAW_SECONDS, self.chat.draw)
        self.set_interval(_STATUS_SECONDS, self.show_status)
        self.set_interval(_PANEL_SECONDS, self._tick)
        self.set_interval(_IDLE_SECONDS, self._look_around)
        self.show_parts()
        self._show_empty()

    def on_unmount(self) -> None:
        """Write what is left."""
        self.chat.stop()
        self.writer.close()

    @property
    def conversation(self) -> OpenConversation:
        """The conversation on the screen."""
        return self.chat.conversation

    @property
    def transcript(self) -> Transcript:
        """The messages."""
        return self.query_one(Transcript)

    @property
    def prompt(self) -> Prompt:
        """Where questions are written."""
        return self.query_one(Prompt)

    @property
    def sidebar(self) -> Sidebar:
        """The list of chats."""
        return self.query_one(Sidebar)

    @property
    def _panel(self) -> MachinePanel:
        return self.query_one(MachinePanel)

    def on_resize(self) -> None:
        """Show what there is room for."""
        self.show_parts()

    def show_parts(self) -> None:
        """Show what is wanted, or what there is room for."""
        width = self.size.width
        panel = self._panel_shown
        if panel is None:
            panel = width >= _PANEL_FROM and bool(self.app.layers().value("show_panel"))
        sidebar = width >= _SIDEBAR_FROM if self._list_shown is None else self._list_shown
        if panel and sidebar and width < _SIDEBAR_FROM:
            # There is no room for both beside the messages: the one asked for last counts.
            panel, sidebar = not self._list_asked_last, self._list_asked_last
        self._panel.set_class(panel, "shown")
        self.sidebar.set_class(sidebar, "shown")
        self._show_panel()

    def _show_empty(self) -> None:
        empty = not self.transcript.entries
        self.query_one("#welcome").set_class(empty, "shown")
        self.transcript.set_class(empty, "hidden")

    # Now and then

    def _tick(self) -> None:
        if self.chat.replying is not None or self.app.engine.loading is not None:
            self._show_panel()

    def _look_around(self) -> None:
        """Figures while nothing goes on, and chats that another app has changed."""
        self._show_panel()
        try:
            counter = self.store.change_counter()
        except StoreError as error:
            self.complain(str(error))
            return
        if counter != self._counter:
            self._counter = counter
            self.sidebar.look()
            self.chat.follow()
            self._show_empty()

    def _show_panel(self) -> None:
        if self._panel.has_class("shown"):
            engine = self.app.engine
            reading = engine.reading(_READING_SECONDS)
            self._panel.show(progress_of(engine, self.chat.last_run), reading)

    def show_status(self) -> None:
        """Say what goes on."""
        self.query_one(StatusLine).show(self.app.engine, self.app.loaded, self.chat)

    # What the engine tells

    def told(self, event: Event) -> None:
        """Take note of what the engine has done."""
        match event:
            case Loaded():
                self.prompt.count_tokens = self.app.engine.count_tokens
                if notice := load_notice(event):
                    self.tell(notice)
                self.query_one("#welcome", Static).update(WELCOME + about(event))
                self.chat.warm()
            case LoadFailed():
                self.app.push_screen(ErrorDialog(f"{event.name} cannot be loaded", event.message))
            case Ended():
                self.chat.ended(event.run)
                self.sidebar.look()
                due, self._due = self._due, None
                if due is not None:
                    due()
            case Opened():
                pass
        self._show_panel()
        self.show_status()

    def when_free(self, action: Callable[[], None]) -> None:
        """Do something that has to wait for the reply that is being written."""
        if self.chat.replying is None:
            action()
        else:
            self._due = action
            self.tell("This counts after the reply, when the model is loaded again.")

    def tell(self, text: str) -> None:
        """A word to the user that goes by itself."""
        self.app.clear_notifications()
        self.notify(literal(text), markup=False)

    def complain(self, text: str) -> None:
        """Something went wrong."""
        self.app.clear_notifications()
        self.notify(literal(text), severity="error", timeout=10, markup=False)

    @on(WriteFailed)
    def _write_failed(self, event: WriteFailed) -> None:
        self.complain(event.text)

    # Questions

    @on(Prompt.Submitted)
    def _submitted(self, event: Prompt.Submitted) -> None:
        text = event.text
        try:
            if text.startswith("/") and not event.attachments and "\n" not in text:
                self.commands.run(text)
                return
            if not self.app.engine.ready:
                raise ValueError(self.app.no_model_yet())
            self.chat.ask(text, event.attachments)
            self._leave_edit()
        except (ValueError, OSError) as error:
            self.prompt.set_text(text, event.attachments)
            self.complain(str(error))
            return
        self._changed()

    @on(Prompt.Failed)
    def _prompt_failed(self, event: Prompt.Failed) -> None:
        self.complain(event.message)

    def _earlier_questions(self) -> list[str]:
        try:
            return self.store.questions(_HISTORY)
        except StoreError:
            return []

    def _changed(self) -> None:
        """The conversation has other messages now."""
        self._show_empty()
        self.sidebar.show_current(self.conversation.id)
        self.sidebar.look()
        self.show_status()

    def _try(self, action: Any, *arguments: Any) -> None:
        """Do something with the chat; what cannot be done is told."""
        try:
            action(*arguments)
        except (ValueError, OSError) as error:
            self.complain(str(error))
        self._changed()

    @on(Transcript.Asked)
    def _asked(self, event: Transcript.Asked) -> None:
        match event.what:
            case "edit":
                self._try(self._edit, event.entry)
            case "regenerate":
                self._try(self.chat.regenerate, event.entry)
            case _:
                self._try(self.chat.go_on, event.entry)

    def _edit(self, entry: Any) -> None:
        message = self.chat.edit(entry)
        if self._draft is None:
            self._draft = self.prompt.text, self.prompt.attachments
        self.prompt.set_text(message.content, message.attachments)
        self.prompt.focus()

    @on(Transcript.BranchAsked)
    def _branch_asked(self, event: Transcript.BranchAsked) -> None:
        self._try(self.chat.switch, event.entry, event.step)

    @on(Transcript.Copy)
    def _copy(self, event: Transcript.Copy) -> None:
        self.app.copy_to_clipboard(event.text)
        self.tell(f"Copied {event.what}")

    # Keys

    def action_stop(self) -> None:
        """Stop the reply; else leave what is being edited; else go back to the prompt."""
        if self.chat.stop():
            self.show_status()
        elif self.chat.editing is not None:
            self._leave_edit()
            self.show_status()
        elif self.has_class("-narrow") and (self._list_shown or self._panel_shown):
            self._list_shown = self._panel_shown = None
            self.show_parts()
        self.prompt.focus()

    def _leave_edit(self) -> None:
        """What was being written before comes back."""
        self.chat.editing = None
        draft, self._draft = self._draft, None
        if draft is not None:
            self.prompt.set_text(*draft)

    def action_interrupt(self) -> None:
        """Stop the reply; where there is none, the key means something else."""
        if not self.chat.stop():
            raise SkipAction

    def action_messages(self) -> None:
        """Let keys choose a message."""
        if self.transcript.entries:
            self.transcript.focus()
            self.transcript.action_previous()

    def action_scroll(self, pages: int) -> None:
        """Scroll the messages while writing."""
        self.transcript.action_page(pages)

    def action_regenerate(self) -> None:
        """Answer the last question again."""
        self._try(self.chat.regenerate)

    def action_continue(self) -> None:
        """Go on with the last reply."""
        self._try(self.chat.go_on)

    def action_thinking(self) -> None:
        """Fold or unfold what the selected or last message thought."""
        self.transcript.action_toggle_thinking()

    def action_copy_last(self) -> None:
        """Copy the last reply."""
        replies = [e for e in self.transcript.entries if e.role == "assistant"]
        if replies:
            self._copy(Transcript.Copy(replies[-1].content, "the last reply"))
        else:
            self.tell("There is no reply to copy yet.")

    def action_machine(self) -> None:
        """Show or hide what the machine does."""
        self._panel_shown = not self._panel.has_class("shown")
        self._list_asked_last = False
        self.show_parts()

    def action_chats(self) -> None:
        """Show the list of chats and go to it; from there, hide it."""
        shown = self.sidebar.has_class("shown")
        inside = shown and self.sidebar.has_focus_within
        self._list_shown = not inside
        self._list_asked_last = True
        self.show_parts()
        if inside:
            self.prompt.focus()
        else:
            self.sidebar.focus_list()

    def action_new(self) -> None:
        """Begin another chat."""
        self.open_chat(None)

    def action_models(self) -> None:
        """Choose a model."""
        self.app.choose_model()

    def action_settings(self) -> None:
        """Change settings."""
        self.app.edit_settings()

    def action_help(self) -> None:
        """List all keys and commands."""
        self.app.show_help()

    # Conversations

    def open_chat(self, id: int | None) -> None:  # noqa: A002  the store's name for it
        """Show a conversation; None begins another one."""
        try:
            self.chat.open(id)
        except StoreError as error:
            self.complain(str(error))
            return
        self._leave_edit()
        if self.has_class("-narrow"):
            self._list_shown = None
            self.show_parts()
        self._panel.start_chat()
        self.prompt.focus()
        self._changed()
        self.app.settings_changed()

    @on(Sidebar.Opened)
    def _opened(self, event: Sidebar.Opened) -> None:
        self.open_chat(event.id)

    def rename(self, title: str) -> None:
        """Give the conversation on the screen another title."""
        self._try(self.conversation.rename, title)

    @on(Sidebar.RenameAsked)
    def _rename_asked(self, event: Sidebar.RenameAsked) -> None:
        def renamed(title: str | None) -> None:
            if title:
                if event.id == self.conversation.id:
                    self.rename(title)
                else:
                    self._try(self.store.rename, event.id, title)

        self.app.push_screen(AskText("Rename the chat", event.title), renamed)

    @on(Sidebar.DeleteAsked)
    def _delete_asked(self, event: Sidebar.DeleteAsked) -> None:
        if event.id == self.conversation.id:
            self.chat.open(None)
        self._deleted.append(event.id)
        self._try(self.store.delete, event.id)
        self.sidebar.focus_list()
        self.tell("Deleted; u brings it back")

    @on(Sidebar.UndoAsked)
    def _undo_asked(self) -> None:
        if self._deleted:
            self._try(self.store.undelete, self._deleted.pop())

    # Settings

    def load_model(self, name: str) -> None:
        """Load another model."""
        self.chat.stop()
        self.app.load_model(name)

    def change_setting(self, key: str, value: Any) -> None:
        """Change a setting of this chat; None resets it."""
        settings = {k: v for k, v in self.conversation.settings.items() if k != key}
        if value is not None:
            settings[key] = value
        self.conversation.save_settings(settings)
        self.app.settings_changed()

    def figures(self) -> str:
        """The figures of the last reply in one line."""
        replies = [m for m in self.conversation.messages if m.role == "assistant"]
        if not replies:
            return "No reply yet"
        return stats_line(stats_of(replies[-1])).strip("[]")
