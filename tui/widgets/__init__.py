"""The widgets of the chat app."""
