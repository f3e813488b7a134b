"""Runs models over a text and scores what they predict, alone or beside a reference.

Of each window, the second half is scored: every scored token has at least half a window before it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from localds.scores import Scores, join, perplexity, score_rows
from localds.units import format_size
from localds.windows import check_size, states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import IO

    from numpy.typing import NDArray

    from localds.model import Model
    from localds.ops import Head
    from localds.windows import Windows

    Floats = NDArray[np.float32]
    Progress = Callable[[int, str], None]

# Rows of logits at once: 33 MB in float32 for a vocabulary of 129k, ...
_ROWS = 64
# ... and those of them that are worked on in float64: 8 MB, several times.
_SCORED_ROWS = 8


def evaluate(
    model: Model,
    windows: Windows,
    reference: Model | None = None,
    on_progress: Progress | None = None,
) -> Scores:
    """Score the second half of each window.

    With a reference, that is run first, and its hidden states wait in a temporary file (4 bytes
    for each scored token and hidden dimension), from which its logits are computed again beside
    the model's: the layers of only one of the two are in use at a time, and all its bits are kept.

    `on_progress(tokens, note)` is called after each window of each model, `note` being the
    perplexity so far. Raises `ValueError` for windows that leave nothing to score, different
    vocabularies, and a disk without room for the temporary file.
    """
    if windows.size < 4:
        raise ValueError(f"windows of {windows.size} tokens leave nothing to score; use at least 4")
    if reference is None:
        return _score(model, windows, None, repeat(None), on_progress)
    check_vocabularies(model, reference)
    check_size(reference, windows.size)
    with _spool(windows, reference.geometry.hidden) as file:
        for hidden in states(reference.decoder, windows):
            file.write(np.ascontiguousarray(_scored(hidden)).data)
            if on_progress:
                on_progress(windows.size, "reference")
        file.seek(0)
        kept = _read_states(file, windows, reference.geometry.hidden)
        return _score(model, windows, reference.decoder.head, kept, on_progress)


def check_vocabularies(model: Model, reference: Model) -> None:
    """Raise `ValueError` unless both predict the same tokens under the same ids."""
    names = [str(m.gguf.path) for m in (model, reference)]
    sizes = [m.geometry.vocabulary for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{names[0]} predicts {sizes[0]} tokens and {names[1]} {sizes[1]}: models with "
            "different vocabularies cannot be compared; choose a reference of the same family"
        )
    texts = [m.gguf.strings("tokenizer.ggml.tokens") for m in (model, reference)]
    for token, (ours, theirs) in enumerate(zip(*texts, strict=True)):
        if ours != theirs:
            raise ValueError(
                f"token {token} is {ours!r} in {names[0]} and {theirs!r} in {names[1]}: models "
                "with different vocabularies cannot be compared; choose a reference of the same "
                "family"
            )


def _score(
    model: Model,
    windows: Windows,
    reference_head: Head[Floats] | None,
    reference_states: Iterable[Floats | None],
    on_progress: Progress | None,
) -> Scores:
    parts: list[Scores] = []
    for hidden, tokens, kept in zip(
        states(model.decoder, windows), windows.tokens, reference_states, strict=False
    ):
        rows, targets = _scored(hidden), tokens[windows.size // 2 + 1 :]
        for start in range(0, len(rows), _ROWS):
            block = slice(start, start + _ROWS)
            logits = model.decoder.head(rows[block], last_only=False)
            reference = None
            if reference_head is not None and kept is not None:
                reference = reference_head(kept[block], last_only=False)
            parts += _score_block(logits, targets[block], reference)
        so_far = perplexity(np.concatenate([part.nll for part in parts])).value
        if not np.isfinite(so_far):
            raise ValueError(
                f"{model.gguf.path}: predictions are not finite; look for damaged weights with "
                "`localds inspect --check`"
            )
        if on_progress:
            on_progress(windows.size, f"perplexity {so_far:.4g}")
    return join(parts)


def _score_block(
    logits: Floats, targets: NDArray[np.int32], reference: Floats | None
) -> Iterator[Scores]:
    for start in range(0, len(logits), _SCORED_ROWS):
        rows = slice(start, start + _SCORED_ROWS)
        yield score_rows(
            logits[rows], targets[rows], None if reference is None else reference[rows]
        )


def _scored(hidden: Floats) -> Floats:
    """The rows that predict the tokens after the first half of a window, but for its first."""
    return hidden[len(hidden) // 2 : -1]


def _read_states(file: IO[bytes], windows: Windows, hidden: int) -> Iterator[Floats]:
    """Each window's scored rows from the temporary file."""
    rows = windows.size - windows.size // 2 - 1
    for _ in windows.tokens:
        yield np.frombuffer(file.read(4 * rows * hidden), np.float32).reshape(rows, hidden)


@contextmanager
def _spool(windows: Windows, hidden: int) -> Iterator[IO[bytes]]:
    """A temporary file with room for the scored rows of all windows."""
    rows = len(windows.tokens) * (windows.size - windows.size // 2 - 1)
    # /tmp often lies in memory, which is what this file saves.
    disk = Path("/var/tmp")  # noqa: S108
    folder = os.environ.get("TMPDIR") or (
        disk if os.access(disk, os.W_OK) else tempfile.gettempdir()
    )
    needed, free = 4 * rows * hidden, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the reference's hidden states take {format_size(needed)}, but {folder} has "
            f"{format_size(free)} left; read fewer windows (--chunks) or set TMPDIR"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        yield file
