"""A loaded model: the file, its tokenizer and template, and the layers prepared on a device."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from localds import _native, models
from localds.catalog.resolve import find_model
from localds.fingerprint import fingerprint
from localds.gguf import GGUFFile
from localds.memory.kept_rows import KeptRows
from localds.memory.latents import LatentCache
from localds.memory.machine import budget_for
from localds.memory.offload import Offload
from localds.memory.placement import place
from localds.memory.plan import DEFAULT_CHUNK, BudgetError, make_plan
from localds.memory.trunk import read_trunk
from localds.ops.cpu import CpuOps
from localds.session import DEFAULT_CONTEXT, Session
from localds.settings import cache_folder
from localds.template import ChatTemplate, template_for
from localds.tokenizer import Tokenizer
from localds.units import format_size
from localds.usage import keep_usage, read_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray

    from localds.memory.experts import ExpertStore
    from localds.memory.placement import Placement
    from localds.memory.plan import Plan
    from localds.models.decoder import Decoder
    from localds.models.geometry import Geometry

    Progress = Callable[[int, int], None]


class Model:
    """What `load` returns. Weights stay in the file's memory map where they fit the budget.

    Where they do not, routed experts are read when they are needed (`offload`, None where all
    fits), and everything else lies in memory. `tokenizer`, `template` and `geometry` are public;
    sessions share the weights and one set of threads, so only one of them computes at a time.
    """

    def __init__(
        self, gguf: GGUFFile, placement: Placement, on_progress: Progress | None = None
    ) -> None:
        self.gguf = gguf
        self.placement = placement
        self.geometry: Geometry = models.read_geometry(gguf)
        self.tokenizer = Tokenizer.from_gguf(gguf)
        self.template: ChatTemplate = template_for(gguf, self.tokenizer)
        self.template.start()  # its process gets ready while the layers are prepared
        self.offload: Offload | None = None
        if not placement.resident:
            read_trunk(gguf, self.geometry.layers, on_progress)
            self.offload = Offload(gguf, self.geometry, placement)
        ops = CpuOps(experts=self.experts)
        self.decoder: Decoder[NDArray[np.float32]] = models.build(gguf, ops)
        if self.offload:
            self.offload.start(read_usage(gguf, *self.offload.shape))

    @property
    def experts(self) -> ExpertStore | None:
        """Where layers take routed experts from that are not in the file's map."""
        return self.offload.store if self.offload else None

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
        longer than the model was made for, `BudgetError` for one that the budget does not hold.
        """
        self._plan_for(context or DEFAULT_CONTEXT, cache_type, chunk)
        return Session(
            self.decoder,
            self.tokenizer,
            self.template,
            context,
            cache_type=cache_type,
            chunk=chunk,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Tells the weights from all others, in hex. Raises `OSError` for a file that is gone."""
        return fingerprint(self.gguf)

    def kept_rows(self, cap_bytes: int | None = None) -> KeptRows:
        """Where sessions keep rows on disk, see `Session.restore`; of all models `cap_bytes`.

        The default cap is 4 GiB, but at most a tenth of what is free on the disk. Raises `OSError`
        for a model's file that is gone.
        """
        return KeptRows(cache_folder() / "latents", self.fingerprint, cap_bytes)

    def set_ram(self, ram: int | str) -> None:
        """Change the budget of a model that is running. Raises `BudgetError` below what it needs.

        The pool of experts grows or shrinks at once. A model that lies in memory as a whole stays
        there.
        """
        self._place(budget_for(ram), self.placement.plan)

    def _plan_for(self, context: int, cache_type: str, chunk: int) -> None:
        """Make room for a session, from the pool of experts."""
        plan = make_plan(self.gguf, self.geometry, context, cache_type, chunk)
        self._place(self.placement.budget, plan)

    def _place(self, budget: int | None, plan: Plan) -> None:
        pooled = self.offload is not None
        placement = place(self.gguf, self.geometry, plan, budget, pooled=pooled)
        if self.offload:
            self.offload.resize(placement)
        elif not placement.resident:
            raise BudgetError(
                f"{format_size(plan.total)} are needed with a context of {plan.context} tokens, "
                f"the budget is {format_size(budget or 0)}: load the model again with this "
                "context, so that experts are left on disk, or choose a shorter one"
            )
        self.placement = placement

    def close(self) -> None:
        """Release memory, threads and the template's helper process; keep what experts were used.

        The map goes with the last reference to it.
        """
        self.template.close()
        if self.offload:
            keep_usage(self.gguf, self.offload.store.counts())
            self.offload.close()

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
    context: int | None = None,
    cache_type: str = "f16",
    chunk: int = DEFAULT_CHUNK,
    on_progress: Progress | None = None,
) -> Model:
    """Load a model: a GGUF file (of a split file, the first part), or one that is installed.

    `path` may be a name as `localds list` shows it, NAME[:QUANT], or owner/repository[:QUANT].
    `device` is "auto" or "cpu". `ram` is a limit in bytes, or a size such as "12GiB", on what the
    model takes in all, the system's cache of its file included; by default what is free now and
    what control groups allow, less a reserve. What does not fit stays on disk: routed experts are
    read when they are needed. `vram` is a limit on GPU memory and needs a GPU device. `threads`
    defaults to the physical cores that this process may use. `context`, `cache_type` and `chunk`
    are those of the session to make room for; `on_progress(done, total)` counts bytes that are
    read before the model is ready.

    Raises `GGUFError` for a file that is broken or cannot be run, `TokenizerError` for its
    vocabulary, `BudgetError` for a budget that does not hold what must be in memory,
    `NotInstalledError` for a name that must be pulled first, `ReadError` (an `OSError`) where the
    disk fails, `ValueError` for the arguments.
    """
    if device not in ("auto", "cpu"):
        raise ValueError(f"device {device!r} is not available; this build computes on 'cpu'")
    if vram is not None:
        raise ValueError("vram is a limit on GPU memory, but the device is the CPU; leave it out")
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads}; it must be from 1 to 1024")
    gguf = GGUFFile.open(find_model(path).path if isinstance(path, str) else path)
    geometry = models.read_geometry(gguf)
    plan = make_plan(gguf, geometry, context or DEFAULT_CONTEXT, cache_type, chunk)
    placement = place(gguf, geometry, plan, budget_for(ram))
    _native.set_threads(threads or _native.default_threads())
    return Model(gguf, placement, on_progress)
