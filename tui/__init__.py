"""Conversations in a terminal. Talks to `localds.session` only; knows no tensor."""
