"""The screens of the chat app, each with its stylesheet."""
