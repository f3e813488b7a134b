"""The commands, one module each. What is heavy to import is imported when a command runs."""
