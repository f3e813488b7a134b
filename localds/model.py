"""A loaded model: the file, its tokenizer and template, and the layers prepared on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from localds import _native, models
from localds.catalog.resolve import find_model
from localds.gguf import GGUFFile
from localds.memory.latents import LatentCache
from localds.memory.plan import DEFAULT_CHUNK, make_plan, require_budget
from localds.ops.cpu import CpuOps
from localds.session import DEFAULT_CONTEXT, Session
from localds.template import ChatTemplate, template_for
from localds.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray

    from localds.models.decoder import Decoder
    from localds.models.geometry import Geometry


class Model:
    """What `load` returns. Weights stay in the file's memory map; nothing is copied.

    `tokenizer`, `template` and `geometry` are public; sessions share the weights and one set of
    threads, so only one of them computes at a time.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.geometry: Geometry = models.read_geometry(gguf)
        self.tokenizer = Tokenizer.from_gguf(gguf)
        self.template: ChatTemplate = template_for(gguf, self.tokenizer)
        self.template.start()  # its process gets ready while the layers are prepared
        self.decoder: Decoder[NDArray[np.float32]] = models.build(gguf, CpuOps())

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits float32 [n_tokens, n_vocab] of the tokens `ids`, with no cache kept.

        Keys and values are kept in float32 meanwhile. Raises `ValueError` for no tokens, or ids
        outside the vocabulary.
        """
        if not len(ids):
            raise ValueError("logits of no tokens: give at least one id")
        geometry = self.geometry
        cache = LatentCache(geometry.layers, geometry.cache_width, len(ids), "f32")
        chunks = [
            self.decoder.forward(np.asarray(part, np.int32), cache, last_only=False)
            for part in (ids[i : i + DEFAULT_CHUNK] for i in range(0, len(ids), DEFAULT_CHUNK))
        ]
        return np.concatenate(chunks)

    def session(
        self, context: int | None = None, *, cache_type: str = "f16", chunk: int = DEFAULT_CHUNK
    ) -> Session:
        """Start a conversation of up to `context` tokens.

        The default context is the model's own, at most 8192. `cache_type` is f16, q8_0 or f32;
        `chunk` the number of prompt tokens computed at once. Raises `ContextError` for a context
        longer than the model was made for.
        """
        return Session(
            self.decoder,
            self.tokenizer,
            self.template,
            context,
            cache_type=cache_type,
            chunk=chunk,
        )

    def close(self) -> None:
        """Release the template's helper process; the map goes with the last reference to it."""
        self.template.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    path: str | Path,
    device: str = "auto",
    ram: int | str | None = None,
    vram: int | str | None = None,
    *,
    threads: int | None = None,
) -> Model:
    """Load a model: a GGUF file (of a split file, the first part), or one that is installed.

    `path` may be a name as `localds list` shows it, NAME[:QUANT], or owner/repository[:QUANT].
    `device` is "auto" or "cpu". `ram` is a limit in bytes, or a size such as "12GiB", on what the
    model takes resident; `vram` is one on GPU memory and needs a GPU device. `threads` defaults to
    the physical cores that this process may use.

    Raises `GGUFError` for a file that is broken or cannot be run, `TokenizerError` for its
    vocabulary, `BudgetError` for a budget that does not hold it, `NotInstalledError` for a name
    that must be pulled first, `ValueError` for the arguments.
    """
    if device not in ("auto", "cpu"):
        raise ValueError(f"device {device!r} is not available; this build computes on 'cpu'")
    if vram is not None:
        raise ValueError("vram is a limit on GPU memory, but the device is the CPU; leave it out")
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads}; it must be from 1 to 1024")
    gguf = GGUFFile.open(find_model(path).path if isinstance(path, str) else path)
    if ram is not None:
        require_budget(make_plan(gguf, models.read_geometry(gguf), DEFAULT_CONTEXT), ram)
    _native.set_threads(threads or _native.default_threads())
    return Model(gguf)
