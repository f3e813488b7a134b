"""`localds imatrix`: collect an importance matrix, which makes small quantizations better."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localds.commands.common import ModelFile, ReadText, Threads, check_output, clear_errors
from localds.commands.progress import token_progress

if TYPE_CHECKING:
    from localds.importance import Collector, Unreached

_SAVE_SECONDS = 60
# Saving takes at most this part of the time.
_SAVE_SHARE = 0.05
_LISTED = 8


def imatrix(
    model: ModelFile,
    text: ReadText,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path(
        "imatrix.gguf"
    ),
    chunk_size: Annotated[
        int, typer.Option("--chunk-size", min=2, help="Tokens that are read at once.")
    ] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="Chunks to read. Default: the whole text.")
    ] = None,
    output_weight: Annotated[
        bool, typer.Option("--output-weight", help="Record the output matrix, too.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Read a text with a model and write down which columns of its weights matter.

    The result serves `localds convert --imatrix` and llama.cpp's quantizer. What is collected is
    saved about every minute and on Ctrl-C.
    """
    with clear_errors():
        import localds
        from localds.catalog.resolve import find_model
        from localds.importance import Collector
        from localds.windows import cut, read_text

        path = find_model(model).path
        check_output(output, path)
        words = read_text(text)
        with localds.load(path, "cpu", threads=threads) as loaded:
            windows = cut(loaded, words, chunk_size, chunks)
            collector = Collector(loaded, output_weight=output_weight)
            saver = _Saver(collector, output, str(text), chunk_size)
            try:
                with token_progress("Reading", windows.tokens.size) as advance:
                    for _ in collector.run(windows):
                        saver.save_if_due()
                        advance(chunk_size)
            except KeyboardInterrupt:
                if collector.chunks:
                    saver.save()
                typer.echo(_stopped(collector.chunks, len(windows.tokens), output), err=True)
                raise typer.Exit(130) from None
            saver.save()
        for line in _report(collector.unreached()):
            typer.echo(line, err=True)
        typer.echo(f"{output}: {collector.chunks} chunks of {chunk_size} tokens")


class _Saver:
    """Writes what is collected, now and then or at once."""

    def __init__(self, collector: Collector, output: Path, dataset: str, chunk_size: int) -> None:
        self._collector = collector
        self._output = output
        self._dataset = dataset
        self._chunk_size = chunk_size
        self._pause = float(_SAVE_SECONDS)
        self._saved = time.monotonic()

    def save(self) -> None:
        from localds.importance import save

        started = time.monotonic()
        save(
            self._output,
            self._collector.sums(),
            dataset=self._dataset,
            chunks=self._collector.chunks,
            size=self._chunk_size,
        )
        self._saved = time.monotonic()
        self._pause = max(_SAVE_SECONDS, (self._saved - started) / _SAVE_SHARE)

    def save_if_due(self) -> None:
        if time.monotonic() - self._saved >= self._pause:
            self.save()


def _stopped(done: int, total: int, output: Path) -> str:
    if done == 0:
        return "stopped in the first chunk: nothing was collected"
    return f"stopped after {done} of {total} chunks, which {output} holds"


def _report(unreached: list[Unreached]) -> list[str]:
    """Which experts have no data, a line for each layer."""
    if not unreached:
        return []
    missing = sum(len(layer.experts) for layer in unreached)
    lines = [
        f"{missing} experts in {len(unreached)} layers were never reached and will be quantized "
        "without; a longer or more varied text reaches more:"
    ]
    for layer in unreached:
        names = ", ".join(map(str, layer.experts[:_LISTED]))
        more = ", …" if len(layer.experts) > _LISTED else ""
        lines.append(
            f"  layer {layer.layer}: {len(layer.experts)} of {layer.total} ({names}{more})"
        )
    return lines
