"""Markdown that grows: split into blocks of which only the last is parsed again, and drawn."""
