"""`localds eval`: how well a model predicts a text, alone or beside a reference."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localds.commands.common import Adapters, ModelFile, Threads, adapter_options, clear_errors
from localds.commands.progress import token_progress

if TYPE_CHECKING:
    from localds.scores import Comparison, Estimate


def evaluate(
    model: ModelFile,
    text: Annotated[Path, typer.Argument(help="A UTF-8 text, such as wikitext's wiki.test.raw.")],
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="A reference, named like MODEL: the same with less quantization."
        ),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", "-c", min=4, help="Tokens in a window.")
    ] = 512,
    chunks: Annotated[
        int | None,
        typer.Option("--chunks", min=1, help="Windows to read. Default: the whole text."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    threads: Threads = None,
    adapters: Adapters = None,
) -> None:
    """Measure perplexity, and with --against how far the predictions lie from a reference's.

    The text is read in windows, the second half of which is scored. Perplexities compare only
    between models with the same vocabulary, read with the same --context. With --against, the
    reference is run first; 4 bytes for each scored token and hidden dimension go to a temporary
    file in TMPDIR or /var/tmp.
    """
    with clear_errors(), ExitStack() as stack:
        import localds
        from localds.evaluate import check_vocabularies
        from localds.evaluate import evaluate as score
        from localds.scores import compare, perplexity
        from localds.windows import cut, read_text

        words = read_text(text)
        named = adapter_options(adapters)
        loaded = stack.enter_context(localds.load(model, "cpu", threads=threads, adapters=named))
        windows = cut(loaded, words, context, chunks)
        reference = None
        if against is not None:
            reference = stack.enter_context(localds.load(against, "cpu", threads=threads))
            check_vocabularies(loaded, reference)
        passes = 1 if reference is None else 2
        with token_progress("Reading", passes * windows.tokens.size) as advance:
            scores = score(loaded, windows, reference, advance)
        report: dict[str, Any] = {
            "model": model,
            "adapters": loaded.adapters,
            "text": str(text),
            "context": context,
            "chunks": len(windows.tokens),
            "scored_tokens": len(scores.nll),
            "perplexity": perplexity(scores.nll)._asdict(),
        }
        comparison = None if reference is None else compare(scores)
        if comparison:
            report |= {"against": against, "comparison": _fields(comparison)}
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            lines = [_line("perplexity", perplexity(scores.nll))]
            lines += [] if comparison is None else _comparison_lines(comparison)
            typer.echo("\n".join(lines))


def _fields(comparison: Comparison) -> dict[str, Any]:
    """Estimates as objects with value and error."""
    return {
        name: value if isinstance(value, float) else value._asdict()
        for name in comparison.__slots__
        for value in [getattr(comparison, name)]
    }


def _comparison_lines(comparison: Comparison) -> list[str]:
    same_top = comparison.same_top
    return [
        _line("of the reference", comparison.reference_perplexity),
        _line("difference", comparison.perplexity_difference),
        _line("mean KL divergence", comparison.mean_kl) + " nats",
        f"{'99% are below':<20}{comparison.kl_99:.6g} nats",
        f"{'same best token':<20}{100 * same_top.value:.2f} ± {100 * same_top.error:.2f} %",
    ]


def _line(name: str, estimate: Estimate) -> str:
    return f"{name:<20}{estimate.value:.6g} ± {estimate.error:.2g}"
