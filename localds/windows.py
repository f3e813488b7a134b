"""A text as windows of tokens, each of which a model reads on its own.

As llama.cpp does: the text is tokenized whole, cut into windows of equal size without overlap, and
what is left at the end is dropped. Where texts begin with bos, it takes the place of each window's
first token.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from localds.memory.latents import LatentCache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from localds.model import Model
    from localds.models.decoder import Decoder

    Floats = NDArray[np.float32]


class Windows(NamedTuple):
    """`tokens` int32 [n_windows, size] as in the text, `inputs` the same with bos in front."""

    tokens: NDArray[np.int32]
    inputs: NDArray[np.int32]

    @property
    def size(self) -> int:
        """Tokens in a window."""
        return int(self.tokens.shape[1])


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises `ValueError` for an empty one or another encoding."""
    data = Path(path).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; convert the text to UTF-8 first"
        ) from None
    if not text.strip():
        raise ValueError(f"{path}: the text is empty; give a file with text to read")
    return text


def cut(model: Model, text: str, size: int, limit: int | None = None) -> Windows:
    """Windows of `size` tokens, at most `limit` of them.

    Raises `ValueError` for a text shorter than one window and a window that is longer than the
    model's context.
    """
    check_size(model, size)
    ids = model.tokenizer.encode(text)
    count = len(ids) // size
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, less than one window of {size}; "
            "give a longer text or choose smaller windows"
        )
    count = min(count, limit or count)
    tokens = np.array(ids[: count * size], np.int32).reshape(count, size)
    return Windows(tokens, _with_bos(model, tokens))


def beginning(model: Model, text: str, limit: int | None = None) -> NDArray[np.int32]:
    """One window's inputs int32 [size]: the text's first tokens, as many as the context holds.

    At most `limit` of them.
    """
    longest = model.geometry.context_length
    ids = model.tokenizer.encode(text)[: min(longest, limit or longest)]
    inputs: NDArray[np.int32] = _with_bos(model, np.array([ids], np.int32))[0]
    return inputs


def _with_bos(model: Model, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    inputs = tokens.copy()
    bos = model.tokenizer.bos_id
    if bos is not None and model.tokenizer.add_bos:
        inputs[:, 0] = bos
    return inputs


def check_size(model: Model, size: int) -> None:
    """Raise `ValueError` for windows longer than the model's context."""
    longest = model.geometry.context_length
    if size > longest:
        raise ValueError(
            f"{model.gguf.path} was made for at most {longest} tokens, not for windows of {size}; "
            "choose smaller windows"
        )


def states(decoder: Decoder[Floats], windows: Windows) -> Iterator[Floats]:
    """The hidden states float32 [size, hidden] of each window, before the head."""
    geometry = decoder.geometry
    cache = LatentCache(geometry.layers, geometry.cache_width, windows.size)
    for ids in windows.inputs:
        cache.truncate(0)
        yield decoder.states(ids, cache)
