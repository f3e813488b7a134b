"""The model and its session, on a thread of their own: the app asks, and is told.

Only that thread computes. The app stays free to draw and to take keys: native code runs without the
interpreter's lock.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from localds import monitor
from localds.adapters import parse_adapter
from localds.catalog.resolve import find_model, remember_choice
from localds.gguf import GGUFFile
from localds.memory.kept_rows import KeepError
from localds.model import load
from localds.models import read_geometry
from localds.recommended import recommended_sampling
from localds.session import Session
from tui.attachments import estimate_tokens
from tui.run import Request, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from localds.catalog.resolve import Found
    from localds.memory.gpu_plan import GpuPlacement
    from localds.memory.placement import Placement
    from localds.model import Model

_SWITCH_SECONDS = 0.0005
_PIECE = 1 << 15  # characters


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What `localds.load` and `Model.session` take."""

    context: int | None = None
    cache_type: str = "f16"
    ram: str | None = None
    device: str = "auto"
    vram: str | None = None
    cpu_moe: bool = False
    n_cpu_moe: int | None = None
    threads: int | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model is ready. `name` finds it again; `recommended` is sampling that its file names.

    `placement` is what lies in RAM and on disk, `gpu` what lies on a GPU, and `notes` are what else
    to tell. Of the `options` the context may have been more than the model was made for.
    """

    name: str
    title: str
    found: Found
    placement: Placement
    context: int
    longest_context: int
    options: LoadOptions
    gpu: GpuPlacement | None = None
    notes: tuple[str, ...] = ()
    recommended: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A model could not be loaded, and why. `Loaded` follows where the one before is kept."""

    name: str
    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A reply is complete: `run.finish` tells how it ended."""

    run: Run


@dataclass(frozen=True, slots=True)
class Opened:
    """A conversation's rows are in the cache: `restored` tokens from disk, `computed` again."""

    restored: int
    computed: int


Event = Loaded | LoadFailed | Ended | Opened


class Engine:
    """Runs one job after the other. `report` is called on the engine's thread."""

    def __init__(self, report: Callable[[Event], object]) -> None:
        self._report = report
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle_work = threading.Event()  # set: end what nobody waits for
        self._model: Model | None = None
        self._session: Session | None = None
        self._loaded: Loaded | None = None
        self._reading: tuple[Model, float, monitor.Reading] | None = None
        self._run: Run | None = None
        self.loading: tuple[int, int] | None = None
        # This thread asks for the interpreter's lock after every layer, and should not have to wait
        # for long while the app draws.
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # Asked by the app

    def load(self, name: str | None, options: LoadOptions) -> None:
        """Load a model by file or name (None: the default one), in place of the one before."""
        self._submit(lambda: self._load(name, options))

    def answer(self, request: Request) -> Run:
        """Reply to a conversation; told as `Ended`."""
        run = Run(request)
        self._submit(lambda: self._answer(run))
        return run

    def open(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Bring the cache to a conversation, from disk as far as it is there; told as `Opened`.

        Any other job ends it.
        """
        self._submit(lambda: self._open(messages))

    def stop(self) -> None:
        """End what is running."""
        self._idle_work.set()
        if run := self._run:
            run.stop()

    def close(self, seconds: float = 5.0) -> None:
        """End what is running, and the thread; waits for it at most so long."""
        self._submit(None)
        self.stop()
        self._thread.join(seconds)

    def count_tokens(self, text: str) -> int:
        """The length of a text in tokens of the model, nearly; a guess while none is loaded."""
        model = self._model
        if model is None:
            return estimate_tokens(text)
        # In pieces: the tokenizer holds the interpreter's lock, and keys would wait.
        return sum(
            len(model.tokenizer.encode(text[start : start + _PIECE], bos=False))
            for start in range(0, len(text), _PIECE)
        )

    def reading(self, max_age: float = 0.0) -> monitor.Reading | None:
        """What the machine does, or did at most `max_age` seconds ago; None without a model."""
        model, session = self._model, self._session
        if model is None:
            return None
        now = time.monotonic()
        known = self._reading
        if known is None or known[0] is not model or now - known[1] >= max_age:
            self._reading = known = (model, now, monitor.read(model, session))
        return known[2]

    @property
    def ready(self) -> bool:
        """Whether a model is loaded."""
        return self._session is not None

    @property
    def context_used(self) -> int:
        """Tokens in the cache."""
        return 0 if self._session is None else self._session.length

    @property
    def context_size(self) -> int:
        """Tokens that fit."""
        return 0 if self._session is None else self._session.context

    # On the engine's thread

    def _submit(self, job: Callable[[], None] | None) -> None:
        self._idle_work.set()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._jobs.empty():
                self._idle_work.clear()
            job()
        self._unload()

    def _load(self, name: str | None, options: LoadOptions) -> None:
        before = self._loaded
        try:
            self._replace_model(name, options)
        except (ValueError, OSError, MemoryError) as error:
            message = str(error) or "not enough memory; choose a smaller context or model"
            self._report(LoadFailed(name or "the default model", message))
            if before is not None and self._model is None:
                with suppress(ValueError, OSError, MemoryError):
                    self._replace_model(before.name, before.options)
        if self._loaded is not None:
            self._report(self._loaded)

    def _replace_model(self, name: str | None, options: LoadOptions) -> None:
        """Load a model; the one before goes as soon as this one is known to be readable."""
        found = find_model(name)
        with GGUFFile.open(found.path) as gguf:
            longest = read_geometry(gguf).context_length
        self._unload()
        context = None if options.context is None else min(options.context, longest)
        self.loading = (0, 0)
        try:
            model = load(
                found.path,
                ram=options.ram,
                device=options.device,
                vram=options.vram,
                cpu_moe=options.cpu_moe,
                n_cpu_moe=options.n_cpu_moe,
                threads=options.threads,
                context=context,
                cache_type=options.cache_type,
                adapters=[parse_adapter(text) for text in options.adapters],
                on_progress=self._show_loading,
            )
        finally:
            self.loading = None
        try:
            self._session = model.session(context, cache_type=options.cache_type)
            recommended = recommended_sampling(model.gguf)
        except BaseException:
            self._session = None
            model.close()
            raise
        self._model = model
        remember_choice(found)
        self._loaded = Loaded(
            name=name or str(found.path),
            title=found.title,
            found=found,
            placement=model.placement,
            context=self._session.context,
            longest_context=longest,
            options=options,
            gpu=model.on_gpu.placement if model.on_gpu else None,
            notes=(*model.notes, *(f"adapter {name}, scale {by:g}" for name, by in model.adapters)),
            recommended=recommended,
        )

    def _show_loading(self, done: int, total: int) -> None:
        self.loading = (done, total)

    def _unload(self) -> None:
        model, self._model, self._session = self._model, None, None
        self._loaded = self._reading = None
        if model is not None:
            model.close()

    def _answer(self, run: Run) -> None:
        if self._session is None:
            run.finish = "error: no model is loaded; choose one with /model"
        elif run.stopped:
            run.finish = "stopped"
        else:
            self._run = run
            run.finish = self._generate(self._session, run)
            self._run = None
        self._report(Ended(run))
        self._keep()

    @staticmethod
    def _generate(session: Session, run: Run) -> str:
        """Make the reply; returns how it ended."""
        request = run.request
        try:
            pieces = session.generate(
                [dict(message) for message in request.messages],
                on_progress=run.show_progress,
                reply_so_far=request.reply_so_far,
                interrupt=run.interrupt,
                **request.options,
            )
            for piece in pieces:
                run.stats = session.stats
                run.put(piece)
                if run.stopped:
                    break
        except (ValueError, OSError, MemoryError) as error:
            return f"error: {error or 'not enough memory; choose a smaller context'}"
        run.stats = session.stats
        return "stopped" if run.stopped else session.stats.finish_reason

    def _open(self, messages: Sequence[Mapping[str, str]]) -> None:
        model, session = self._model, self._session
        if model is None or session is None or self._idle_work.is_set():
            return
        prompt = [dict(message) for message in messages]
        try:
            restored = session.restore(prompt, model.kept_rows())
            before = session.length
            session.prefill(prompt, interrupt=self._idle_work)
        except (ValueError, OSError, MemoryError):
            # Nothing is lost: the next reply computes what is missing, or tells what is wrong.
            return
        self._report(Opened(restored, session.length - before))

    def _keep(self) -> None:
        """Write the rows to disk for the next time; where that fails they are computed then."""
        if self._model is not None and self._session is not None:
            with suppress(KeepError, OSError):
                self._session.keep(self._model.kept_rows())
