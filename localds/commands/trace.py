"""`localds trace`: record which experts a model chooses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localds.commands.common import ModelFile, Ram, ReadText, Threads, check_output, clear_errors
from localds.commands.progress import token_progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from localds.commands.progress import Advance
    from localds.model import Model
    from localds.routing_trace import Trace, Tracer


def trace(
    model: ModelFile,
    text: ReadText,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path(
        "trace.npz"
    ),
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", min=1, help="Tokens to read. Default: all.")
    ] = None,
    chunk: Annotated[
        int, typer.Option("--chunk", min=1, help="Tokens at once: 1 is as in a reply.")
    ] = 1,
    threads: Threads = None,
    ram: Ram = None,
) -> None:
    """Read a text with a model and write down the experts that each layer chooses.

    The file is a numpy archive: layers and tokens of each call, and ids [tokens, top_k].
    """
    with clear_errors():
        from localds.catalog.resolve import find_model
        from localds.commands.loading import load_model
        from localds.windows import beginning, read_text

        path = find_model(model).path
        check_output(output, path)
        words = read_text(text)
        with load_model(path, device="cpu", threads=threads, ram=ram, chunk=chunk) as loaded:
            recorded = _record(loaded, beginning(loaded, words, tokens), chunk)
        recorded.save(output)
        typer.echo(
            f"{output}: {len(recorded.ids)} choices of {recorded.ids.shape[1]} "
            f"of {recorded.n_experts} experts in {recorded.n_layers} layers"
        )


def _record(model: Model, ids: NDArray[np.int32], chunk: int) -> Trace:
    """Run the tokens; Ctrl-C ends the text early."""
    from localds.routing_trace import Tracer

    tracer = Tracer(model.decoder)
    with token_progress("Reading", len(ids)) as advance:
        try:
            _run(model, tracer, ids, chunk, advance)
        except KeyboardInterrupt:
            typer.echo("stopped: what was read so far is kept", err=True)
    return tracer.trace()


def _run(
    model: Model, tracer: Tracer, ids: NDArray[np.int32], chunk: int, advance: Advance
) -> None:
    from localds.memory.latents import LatentCache

    geometry = model.geometry
    cache = LatentCache(geometry.layers, geometry.cache_width, len(ids))
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        tracer.decoder.states(part, cache)
        advance(len(part))
