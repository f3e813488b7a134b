"""What can be done in a chat: ask, answer again, edit, go on, switch between branches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tui.conversation import OpenConversation, begun
from tui.entries import entry_of, finish_note, speed
from tui.replying import Replying
from tui.run import Request
from tui.store.error import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from localds.thinking import Reply
    from tui.engine import Engine
    from tui.replying import Writer
    from tui.run import Run
    from tui.settings import Layers
    from tui.store.conversations import ConversationStore
    from tui.store.records import Attachment, Message
    from tui.widgets.entry import Entry
    from tui.widgets.transcript import Transcript


class Chat:
    """The conversation on the screen, and the reply that is being made.

    `layers` gives the settings that count now, `title` the loaded model's. Methods raise
    `ValueError` with what to tell the user.
    """

    def __init__(
        self,
        store: ConversationStore,
        engine: Engine,
        writer: Writer,
        transcript: Transcript,
        *,
        layers: Callable[[], Layers],
        title: Callable[[], str],
        sampling: Mapping[str, Any],
    ) -> None:
        self._store = store
        self._engine = engine
        self._writer = writer
        self._transcript = transcript
        self._layers = layers
        self._title = title
        self._sampling = sampling
        self.conversation = OpenConversation(store)
        self.replying: Replying | None = None
        self.last_run: Run | None = None
        self.editing: Message | None = None

    # Conversations

    def open(self, id: int | None) -> None:  # noqa: A002  the store's name for it
        """Show a conversation; None begins another one."""
        self.stop()
        self.conversation = OpenConversation(self._store, id)
        self.editing = None
        self.last_run = None
        self.show()
        self.warm()

    def show(self) -> None:
        """Show the messages of the current branch."""
        if self.editing is not None and self.editing.id not in self._ids():
            self.editing = None
        unfolded = bool(self._layers().value("show_thinking"))
        messages = self.conversation.messages
        self._transcript.show([self._entry(message, unfolded=unfolded) for message in messages])

    def warm(self) -> None:
        """Have the engine bring its cache to the conversation before the next question comes."""
        if self.conversation.messages and self._engine.ready and self.replying is None:
            self._engine.open(self.conversation.prompt(self._system))

    def follow(self) -> None:
        """Another app has written to the store: show what it made of this conversation."""
        if self.conversation.id is None or self.replying is not None or self.editing is not None:
            return
        try:
            now = OpenConversation(self._store, self.conversation.id)
        except StoreError:
            return  # it was deleted there; what is on the screen stays until another is opened
        if now.messages != self.conversation.messages:
            self.conversation = now
            self.show()

    # Questions and replies

    def ask(self, text: str, attachments: Sequence[Attachment] = ()) -> None:
        """Put a question at the end, or in the place of the one that is edited; answer it."""
        self._check_free()
        edited, self.editing = self.editing, None
        if edited is not None:
            self.conversation.cut_before(edited)
        self.conversation.ask(text, attachments, self._title())
        if edited is not None:
            self.show()
        else:
            self._transcript.add(self._entry(self.conversation.messages[-1]))
        self._reply()

    def regenerate(self, entry: Entry | None = None) -> None:
        """Answer again the question of a message, of the last one by default."""
        self._check_free()
        index = self._index(entry)
        message = self.conversation.messages[index]
        if message.role == "user":
            index += 1
        if index == 0:
            raise ValueError("there is no question before this reply")
        if index < len(self.conversation.messages):
            self.conversation.cut_before(self.conversation.messages[index])
        self.show()
        self._reply()

    def edit(self, entry: Entry | None = None) -> Message:
        """The question of a message, to write another one in its place; see `ask`."""
        self._check_free()
        index = self._index(entry)
        while self.conversation.messages[index].role != "user":
            index -= 1
        self.editing = self.conversation.messages[index]
        return self.editing

    def go_on(self, entry: Entry | None = None) -> None:
        """Continue the last reply where it was cut."""
        self._check_free()
        index = self._index(entry)
        message = self.conversation.messages[index]
        if message.role == "user" and index == len(self.conversation.messages) - 1:
            self._reply()  # an answer never came
            return
        if index != len(self.conversation.messages) - 1:
            raise ValueError("only the last reply can go on; switch to its branch, or regenerate")
        if message.finish == "stop":
            raise ValueError("this reply is complete; regenerate it, or ask for more")
        shown = self._transcript.entries[-1]
        shown.note = ""
        self._transcript.changed(shown)
        self._start(message, shown, begun(message))

    def switch(self, entry: Entry, step: int) -> None:
        """Show the version before or after a message, and what follows it."""
        self._check_free()
        message = self.conversation.messages[self._index(entry)]
        if self.conversation.switch(message, step):
            self.show()
            self.warm()

    def stop(self) -> bool:
        """End the reply; False where there is none. What came is kept."""
        replying = self.replying
        if replying is None:
            return False
        replying.run.stop()
        # The engine may need a moment for the layer that it is in; the user does not wait for it.
        self._finish(replying, "stopped")
        return True

    def draw(self) -> None:
        """Show what the reply has become."""
        if self.replying is not None:
            self.replying.draw()

    def ended(self, run: Run) -> None:
        """The engine is done with a reply."""
        if self.replying is not None and self.replying.run is run:
            self._finish(self.replying, run.finish or "stop")

    # Inside

    @property
    def _system(self) -> str | None:
        system: str | None = self._layers().value("system")
        return system

    def _check_free(self) -> None:
        if self.replying is not None:
            raise ValueError("a reply is being written; Esc stops it")

    def _index(self, entry: Entry | None) -> int:
        if not self.conversation.messages:
            raise ValueError("there are no messages yet")
        if entry is None:
            return len(self.conversation.messages) - 1
        return self._ids().index(entry.key)

    def _ids(self) -> list[int]:
        return [message.id for message in self.conversation.messages]

    def _entry(self, message: Message, *, unfolded: bool = False) -> Entry:
        return entry_of(message, self.conversation.versions(message), unfolded=unfolded)

    def _reply(self) -> None:
        message = self.conversation.begin_reply(self._title())
        entry = self._entry(message, unfolded=bool(self._layers().value("show_thinking")))
        entry.note = ""
        self._transcript.add(entry)
        self._start(message, entry, None)

    def _start(self, message: Message, entry: Entry, so_far: Reply | None) -> None:
        layers = self._layers()
        options: dict[str, Any] = {
            **layers.sampling(),
            **self._sampling,
            "max_tokens": layers.value("max_tokens"),
            "stop": tuple(layers.value("stop") or ()),
        }
        upto = len(self.conversation.messages) - 1
        prompt = self.conversation.prompt(self._system, upto=upto)
        run = self._engine.answer(Request(prompt, options, so_far))
        self.last_run = run
        self.replying = Replying(run, message, entry, self._transcript, self._writer)

    def _finish(self, replying: Replying, finish: str) -> None:
        self.replying = None
        changes = replying.end(finish)
        message = self.conversation.changed(replying.message, **changes)
        replying.entry.note = finish_note(finish)
        replying.entry.detail = speed(message)
        self._transcript.changed(replying.entry)
