"""`localds bench`: prefill and decode speed at several depths of context."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from localds.commands.common import CacheType, ModelFile, Ram, Threads, clear_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from localds.model import Model
    from localds.session import Session

_LISTS = ("-p", "--prompt", "-n", "--generate", "-d", "--depth")


class ListOptions(TyperCommand):
    """Lets `-d 0 4096` and `-d 0,4096` stand for `-d 0 -d 4096`, and so for -p and -n."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: D102
        expanded: list[str] = []
        option = ""
        for arg in args:
            if arg in _LISTS:
                option, first = arg, True
            elif option and (first or arg.replace(",", "").isdigit()):
                expanded += [word for value in arg.split(",") for word in (option, value)]
                first = False
            else:
                option = ""
                expanded.append(arg)
        # An option without its value is for the parser to report.
        if option and first:
            expanded.append(option)
        return super().parse_args(ctx, expanded)


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement; names as in llama-bench. Speeds in tokens per second."""

    model: str
    threads: int
    isa: str
    cache_type: str
    n_prompt: int
    n_gen: int
    n_depth: int
    avg_ts: float
    stddev_ts: float
    samples_ts: list[float]


def bench(
    model: ModelFile,
    prompt: Annotated[
        list[int] | None,
        typer.Option("--prompt", "-p", min=0, help="Prompt lengths; 0 for none. Default: 512."),
    ] = None,
    generate: Annotated[
        list[int] | None,
        typer.Option("--generate", "-n", min=0, help="Tokens to generate. Default: 32."),
    ] = None,
    depth: Annotated[
        list[int] | None,
        typer.Option("--depth", "-d", min=0, help="Tokens already in the cache. Default: 0."),
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Runs of each measurement.")
    ] = 3,
    threads: Threads = None,
    cache_type: CacheType = "f16",
    chunk: Annotated[
        int, typer.Option("--chunk", min=1, help="Prompt tokens computed at once.")
    ] = 512,
    ram: Ram = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure prefill and decode speed, in tokens per second.

    Lists may be written `-d 0 4096`, `-d 0,4096` or `-d 0 -d 4096`.
    """
    prompts = [n for n in prompt or [512] if n]
    generates = [n for n in generate or [32] if n]
    depths = depth or [0]
    with clear_errors():
        from localds.model import load

        with load(model, ram=ram, threads=threads) as loaded:
            records = []
            for record in _measure(
                loaded, prompts, generates, depths, repetitions, cache_type, chunk
            ):
                records.append(record)
                if not as_json:
                    if len(records) == 1:
                        typer.echo(_HEADER)
                    typer.echo(_row(record))
            if as_json:
                typer.echo(json.dumps([asdict(record) for record in records], indent=2))


def _measure(
    model: Model,
    prompts: Sequence[int],
    generates: Sequence[int],
    depths: Sequence[int],
    repetitions: int,
    cache_type: str,
    chunk: int,
) -> Iterator[Record]:
    from localds import _native

    longest = max(depths) + max((*prompts, *generates), default=0)
    session = model.session(max(longest, 1), cache_type=cache_type, chunk=chunk)
    # Fault the weights in and wake the threads before anything is timed.
    session.evaluate(_tokens(model, min(chunk, longest)))
    for n_depth in sorted(depths):
        _fill(model, session, n_depth)
        for n_prompt, n_gen in [(n, 0) for n in prompts] + [(0, n) for n in generates]:
            samples = [_run(model, session, n_depth, n_prompt, n_gen) for _ in range(repetitions)]
            yield Record(
                model=str(model.gguf.path),
                threads=_native.threads(),
                isa=_native.isa(),
                cache_type=cache_type,
                n_prompt=n_prompt,
                n_gen=n_gen,
                n_depth=n_depth,
                avg_ts=statistics.fmean(samples),
                stddev_ts=statistics.stdev(samples) if repetitions > 1 else 0.0,
                samples_ts=samples,
            )


def _fill(model: Model, session: Session, depth: int) -> None:
    """Bring the cache to exactly `depth` tokens, keeping what is there."""
    session.truncate(min(depth, len(session.tokens)))
    missing = depth - len(session.tokens)
    if missing:
        session.evaluate(_tokens(model, missing))


def _run(model: Model, session: Session, depth: int, n_prompt: int, n_gen: int) -> float:
    """Tokens per second of one prefill or one generation at `depth`."""
    session.truncate(depth)
    ids = _tokens(model, n_prompt or n_gen)
    started = time.perf_counter()
    if n_prompt:
        session.evaluate(ids)
    else:
        for token in ids:
            session.evaluate([token])
    return len(ids) / (time.perf_counter() - started)


def _tokens(model: Model, count: int) -> list[int]:
    """Arbitrary tokens spread over the vocabulary, the same on every run."""
    return [(7919 * i + 11) % model.geometry.vocabulary for i in range(count)]


_HEADER = f"{'test':>10}  {'depth':>7}  {'tokens/s':>16}"


def _row(record: Record) -> str:
    test = f"pp{record.n_prompt}" if record.n_prompt else f"tg{record.n_gen}"
    speed = f"{record.avg_ts:.2f} ± {record.stddev_ts:.2f}"
    return f"{test:>10}  {record.n_depth:>7}  {speed:>16}"
