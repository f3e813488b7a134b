"""How far things are: for the status line, and for the panel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

from localds.memory.gpu_plan import describe_gpu
from localds.memory.placement import describe
from tui.widgets.machine import Progress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tui.engine import Engine, Loaded
    from tui.run import Run

_LEAST_TITLE = 8


def progress_of(engine: Engine, run: Run | None) -> Progress:
    """The running reply, or the last one."""
    used, size = engine.context_used, engine.context_size
    if engine.loading is not None:
        return Progress(state="loading")
    if run is None:
        return Progress(context_used=used, context_size=size)
    stats = run.stats
    reading = run.first_piece is None
    computed = stats.prompt_tokens - stats.reused_tokens
    return Progress(
        state="idle" if run.finish is not None else "reading" if reading else "answering",
        prompt_done=stats.reused_tokens + (run.prompt_done if reading else computed),
        prompt_total=stats.prompt_tokens or run.prompt_total,
        reused=stats.reused_tokens,
        first_token_seconds=run.first_token_seconds,
        generated=stats.generated_tokens,
        tokens_per_second=run.tokens_per_second,
        prefill_per_second=computed / stats.prefill_seconds if stats.prefill_seconds else 0.0,
        context_used=used,
        context_size=size,
    )


def status_line(progress: Progress, loading: tuple[int, int] | None) -> str:
    """What goes on, in a few words; empty when nothing does."""
    match progress.state:
        case "loading":
            done, total = loading or (0, 0)
            return f"loading {100 * done // total} %" if total else "loading"
        case "reading":
            if not progress.prompt_total:
                return "reading · Esc stops"
            share = 100 * progress.prompt_done // progress.prompt_total
            return f"reading {progress.prompt_total} tokens: {share} % · Esc stops"
        case "answering":
            return f"{progress.tokens_per_second:.1f} tokens/s · Esc stops"
        case _:
            return ""


def one_line(title: str, rest: Iterable[str], width: int) -> str:
    """The parts that are not empty in one line of `width` cells; the title gives way."""
    line = "".join(f" · {part}" for part in rest if part)
    room = max(width - cell_len(line), _LEAST_TITLE)
    return (title if cell_len(title) <= room else set_cell_size(title, room - 1) + "…") + line


def load_notice(loaded: Loaded) -> str:
    """What to tell of a model that was loaded otherwise than was asked for; mostly nothing."""
    notices = list(loaded.notes)
    if (loaded.options.context or 0) > loaded.context:
        notices.append(f"Context: {loaded.context} tokens, the most that this model was made for.")
    if loaded.gpu is not None and not loaded.gpu.resident:
        notices.append(describe_gpu(loaded.gpu))
    if not loaded.placement.resident and not (loaded.gpu and loaded.gpu.unified):
        notices.append(describe(loaded.placement))
    return "\n".join(notices)
