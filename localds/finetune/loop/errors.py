"""What stops a training run that a user can mend."""

from __future__ import annotations


class TrainingError(ValueError):
    """A run that cannot begin, resume or go on; the message says what to do about it."""
