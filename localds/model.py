"""A loaded model: the file, its tokenizer and template, and the layers prepared on a device."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from localds import _native, models
from localds.catalog.resolve import find_model
from localds.fingerprint import fingerprint
from localds.gguf import GGUFFile
from localds.memory.kept_rows import KeptRows
from localds.memory.machine import budget_for
from localds.memory.offload import Offload
from localds.memory.placement import place
from localds.memory.plan import DEFAULT_CHUNK, BudgetError, make_plan
from localds.memory.trunk import read_trunk
from localds.on_gpu import GpuOptions, OnGpu, choose_gpu
from localds.ops.cpu import CpuOps
from localds.ops.mlx_device import GpuError
from localds.session import DEFAULT_CONTEXT, Session, check_context
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

    from localds.adapters import Applied
    from localds.memory.experts import ExpertStore
    from localds.memory.placement import Placement
    from localds.memory.plan import Plan
    from localds.models.decoder import Decoder
    from localds.models.geometry import Geometry

    Progress = Callable[[int, int], None]


class Model:
    """What `load` returns. Weights stay in the file's memory map where they fit the budget.

    Where they do not, routed experts are read when they are needed (`offload`, None where all
    fits), and everything else lies in memory. On a GPU, `on_gpu` says what lies there, and
    `placement` what lies beside it. `adapters` are the names of those that are merged into the
    weights, each with its scale. `notes` are what a person should know about how it was loaded.
    `tokenizer`, `template` and `geometry` are public; sessions share the weights and one set of
    threads, so only one of them computes at a time.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        placement: Placement,
        on_progress: Progress | None = None,
        on_gpu: OnGpu | None = None,
        notes: Sequence[str] = (),
        applied: Applied | None = None,
    ) -> None:
        self.gguf = gguf
        self._applied = applied
        self.adapters: tuple[tuple[str, float], ...] = applied.active if applied else ()
        self.placement = placement
        self.on_gpu = on_gpu
        self.notes = tuple(notes)
        self.geometry: Geometry = models.read_geometry(gguf)
        if applied and not placement.resident:
            applied.check_resident()
        self.tokenizer = Tokenizer.from_gguf(gguf)
        self.template: ChatTemplate = template_for(gguf, self.tokenizer)
        self.template.start()  # its process gets ready while the layers are prepared
        self.offload: Offload | None = None
        if not placement.resident:
            if on_gpu is None:
                adapted = applied.base if applied else ()
                read_trunk(gguf, self.geometry.layers, on_progress, adapted)
            self.offload = Offload(gguf, self.geometry, placement)
        if applied:
            applied.fill(on_progress)
        whole = placement.resident if on_gpu is None else on_gpu.placement.resident
        experts = self.geometry.moe_layers, self.geometry.experts
        usage = None if whole else read_usage(gguf, *experts)
        if on_gpu is None:
            self.decoder: Decoder[Any] = models.build(gguf, CpuOps(experts=self.experts))
        else:
            self.decoder = on_gpu.build(self.experts, usage, on_progress)
        if self.offload:
            self.offload.start(usage if on_gpu is None else on_gpu.left_to_host(usage))

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
        cache = self.decoder.new_cache(len(ids), "f32")
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
        return fingerprint(self.gguf, self._applied)

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
        if self.on_gpu is not None:
            self.on_gpu.plan_again(plan, chunk, cache_type)
        self._place(self.budget, plan)

    @property
    def budget(self) -> int | None:
        """Bytes of the machine's memory that the model may take; None where nothing is known."""
        return self.placement.budget if self.on_gpu is None else self.on_gpu.ram

    def _place(self, budget: int | None, plan: Plan) -> None:
        pooled = self.offload is not None
        if self.on_gpu is not None:
            placement = self.on_gpu.beside(budget, pooled=pooled)
        else:
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
        if self.on_gpu is not None:
            if not self.on_gpu.placement.resident:
                keep_usage(self.gguf, self.on_gpu.usage())
            self.on_gpu.close()
        elif self.offload:
            keep_usage(self.gguf, self.offload.store.counts())
        if self.offload:
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
    cpu_moe: bool = False,
    n_cpu_moe: int | None = None,
    threads: int | None = None,
    context: int | None = None,
    cache_type: str = "f16",
    chunk: int = DEFAULT_CHUNK,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
    adapters: Sequence[tuple[str | Path, float]] = (),
) -> Model:
    """Load a model: a GGUF file (of a split file, the first part), or one that is installed.

    `path` may be a name as `localds list` shows it, NAME[:QUANT], or owner/repository[:QUANT].
    `device` is "cpu", "gpu", or "auto": the GPU that MLX finds, if the model's trunk fits there.
    `ram` is a limit in bytes, or a size such as "12GiB", on what the model takes in all of the
    machine's memory, the system's cache of its file included; by default what is free now and what
    control groups allow, less a reserve. `vram` is one on the GPU's memory, by default what is free
    there less a reserve. Of routed experts the GPU has as many as fit, with `cpu_moe` none, with
    `n_cpu_moe` all but those of the first so many layers; of the others, what does not fit in RAM
    stays on disk and is read when it is needed. `threads` defaults to the physical cores that this
    process may use. `context`, `cache_type` and `chunk` are those of the session to make room for;
    `on_progress(done, total)` counts bytes that are read before the model is ready, and `on_note`
    is told what takes time beside.

    `adapters` are folders of PEFT or GGUF adapters, each with a scale, usually 1: they are merged
    into the weights in memory, and add up.

    Raises `AdapterError` for an adapter that is broken or another model's, or that needs more of it
    in memory, `GGUFError` for a file that is broken or cannot be run, `TokenizerError` for its
    vocabulary, `BudgetError` for a budget that does not hold what must be in memory,
    `NotInstalledError` for a name that must be pulled first, `ReadError` (an `OSError`) where the
    disk fails, `NoGpuError` where there is no GPU and `GpuError` (an `OSError`) where it fails,
    `ContextError` for a context longer than the model was made for, `ValueError` for the arguments.
    """
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads}; it must be from 1 to 1024")
    options = GpuOptions(vram, cpu_moe, n_cpu_moe)
    gpu = choose_gpu(device, options)
    gguf = GGUFFile.open(find_model(path).path if isinstance(path, str) else path)
    geometry = models.read_geometry(gguf)
    check_context(context, geometry)
    # Before all plans, which count what lies in memory then.
    applied = None
    if adapters:
        from localds.adapters import Base, apply, read_adapters

        applied = apply(gguf, read_adapters(adapters, Base.of(gguf)))
    plan = make_plan(gguf, geometry, context or DEFAULT_CONTEXT, cache_type, chunk)
    budget = budget_for(ram)
    _native.set_threads(threads or _native.default_threads())
    notes = []
    if gpu is not None:
        try:
            on_gpu = OnGpu(
                gguf,
                geometry,
                gpu,
                options,
                plan,
                chunk=chunk,
                cache_type=cache_type,
                ram=budget,
                on_note=on_note,
            )
            return Model(gguf, on_gpu.beside(budget), on_progress, on_gpu, applied=applied)
        except (BudgetError, GpuError) as error:
            if device == "gpu" or options.given():
                raise
            notes.append(f"computing on the CPU: {error}")
    placement = place(gguf, geometry, plan, budget)
    return Model(gguf, placement, on_progress, notes=notes, applied=applied)
