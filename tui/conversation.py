"""One conversation as the app works on it: its branch, and how it becomes a prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from localds.session import Stats
from localds.thinking import Reply
from tui.attachments import compose_message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tui.store.conversations import ConversationStore
    from tui.store.records import Attachment, Message

_TITLE_LENGTH = 60


class OpenConversation:
    """The conversation on the screen. It is in the store from its first message on.

    `messages` are those of the current branch. Methods raise `StoreError`.
    """

    def __init__(self, store: ConversationStore, id: int | None = None) -> None:  # noqa: A002
        self._store = store
        self.id = id
        self.title = ""
        self.model = ""
        self.settings: dict[str, Any] = {}
        self.messages: list[Message] = []
        if id is not None:
            found = store.conversation(id)
            self.title, self.model = found.title, found.model
            self.settings = dict(found.settings)
            self.messages = store.branch(id)

    def ask(self, text: str, attachments: Sequence[Attachment], model: str) -> None:
        """Add a question at the end."""
        if self.id is None:
            about = text or (attachments[0].name if attachments else "")
            self.title = self.title or make_title(about)
            self.id = self._store.create(self.title, model, self.settings).id
        parent = self.messages[-1].id if self.messages else None
        self.messages.append(
            self._store.add(self.id, parent, "user", text, attachments=attachments)
        )

    def begin_reply(self, model: str) -> Message:
        """Add an empty reply at the end."""
        assert self.id is not None  # noqa: S101  there is a question
        self._store.set_model(self.id, model)
        self.model = model
        reply = self._store.add(self.id, self.messages[-1].id, "assistant", "", model=model)
        self.messages.append(reply)
        return reply

    def changed(self, message: Message, **changes: Any) -> Message:
        """Note a message's new text, finish or figures, which the caller writes to the store."""
        changed = replace(message, **changes)
        self.messages = [changed if m.id == message.id else m for m in self.messages]
        return changed

    def cut_before(self, message: Message) -> None:
        """End the branch before a message, so that another one can stand in its place."""
        assert self.id is not None  # noqa: S101  it has messages
        index = [m.id for m in self.messages].index(message.id)
        self._store.set_leaf(self.id, message.parent)
        self.messages = self.messages[:index]

    def versions(self, message: Message) -> list[int]:
        """Ids of the messages that stand in the same place, this one included."""
        return self._store.siblings(message.id)

    def switch(self, message: Message, step: int) -> bool:
        """Go to the version before or after a message; False where there is none."""
        versions = self.versions(message)
        place = versions.index(message.id) + step
        if not 0 <= place < len(versions):
            return False
        self.messages = self._store.select(versions[place])
        return True

    def save_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace the settings of this conversation."""
        self.settings = dict(settings)
        if self.id is not None:
            self._store.set_settings(self.id, self.settings)

    def rename(self, title: str) -> None:
        """Give it another title."""
        self.title = title
        if self.id is not None:
            self._store.rename(self.id, title)

    def prompt(self, system: str | None, *, upto: int | None = None) -> list[dict[str, str]]:
        """The messages as a chat template takes them, all or the first `upto`.

        What was thought is left out, as DeepSeek's templates do; a reply without an answer is, too.
        """
        prompt = [{"role": "system", "content": system}] if system else []
        for message in self.messages[:upto]:
            content = compose_message(message.content, message.attachments)
            if content or message.role == "user":
                prompt.append({"role": message.role, "content": content})
        return prompt


def begun(message: Message) -> Reply:
    """A reply as far as it came, to go on with."""
    return Reply(message.thinking, message.content)


def stats_of(message: Message) -> Stats:
    """The figures that are kept with a reply."""
    figures = message.stats
    return Stats(
        prompt_tokens=int(figures.get("prompt_tokens", 0)),
        reused_tokens=int(figures.get("reused_tokens", 0)),
        prefill_seconds=figures.get("prefill_seconds", 0.0),
        generated_tokens=int(figures.get("generated_tokens", 0)),
        decode_seconds=figures.get("decode_seconds", 0.0),
        finish_reason=message.finish,
    )


def make_title(text: str) -> str:
    """The beginning of a text, in one line."""
    title = " ".join(text.split())
    if len(title) > _TITLE_LENGTH:
        title = title[:_TITLE_LENGTH].rsplit(" ", 1)[0] + " …"
    return title or "New chat"
