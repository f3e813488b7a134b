"""The user's chats on disk: conversations as trees of messages, in one SQLite file."""

from tui.store.conversations import ConversationStore
from tui.store.error import StoreError
from tui.store.export import from_json, to_json, to_markdown
from tui.store.records import Attachment, Conversation, Message

__all__ = [
    "Attachment",
    "Conversation",
    "ConversationStore",
    "Message",
    "StoreError",
    "from_json",
    "to_json",
    "to_markdown",
]
