"""`localds bench`: prefill and decode speed at several depths of context."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from localds.commands.common import (
    CacheType,
    CpuMoe,
    Device,
    ModelFile,
    NCpuMoe,
    Ram,
    Threads,
    Vram,
    clear_errors,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from localds.commands.bench_runs import Record

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
    ] = 1024,
    ram: Ram = None,
    device: Device = "auto",
    vram: Vram = None,
    cpu_moe: CpuMoe = False,
    n_cpu_moe: NCpuMoe = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Tell where the time went, step by step.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure prefill and decode speed, in tokens per second, and how near it is to the limit.

    Lists may be written `-d 0 4096`, `-d 0,4096` or `-d 0 -d 4096`.

    The limit is what the machine could do at best, by its speeds of reading memory and of
    multiplying, which are measured first. Counted are the weights and cached rows that must be
    read and the multiply-adds that must be done, G/s being thousand millions of them a second.
    A model small enough for the processor's caches may exceed the limit by reading. Where experts
    stay on disk, the limit counts what was read from there, too, and the disk's speed. On a GPU, a
    limit is known for generating alone: by the weights that are read for a token.
    """
    with clear_errors():
        from localds.commands.bench_runs import Wanted, measure
        from localds.commands.loading import load_model

        wanted = Wanted(
            prompts=[n for n in prompt or [512] if n],
            generates=[n for n in generate or [32] if n],
            depths=depth or [0],
            repetitions=repetitions,
            cache_type=cache_type,
            chunk=chunk,
            ram=ram,
        )
        with load_model(
            model,
            ram=ram,
            device=device,
            vram=vram,
            cpu_moe=cpu_moe,
            n_cpu_moe=n_cpu_moe,
            threads=threads,
            context=wanted.context,
            cache_type=cache_type,
            chunk=chunk,
        ) as loaded:
            records = measure(loaded, wanted)
            if as_json:
                entries = [_entry(record, profile=profile) for record in records]
                typer.echo(json.dumps(entries, indent=2))
            else:
                _print(records, profile=profile)


def _entry(record: Record, *, profile: bool) -> dict[str, Any]:
    entry = asdict(record)
    if not profile:
        del entry["profile"]
    return entry


def _print(records: Iterable[Record], *, profile: bool) -> None:
    """Print each record as soon as it is there."""
    from localds.commands.bench_text import (
        HEADER,
        gpu_line,
        hits_line,
        machine_line,
        profile_lines,
        record_line,
        store_line,
    )

    for number, record in enumerate(records):
        if number == 0:
            typer.echo("\n".join(filter(None, [machine_line(record), gpu_line(record)])))
        if number == 0 or profile:  # a profile parts the table
            typer.echo(f"\n{HEADER}")
        typer.echo(record_line(record))
        for line in filter(None, [hits_line(record), store_line(record)]):
            typer.echo(line)
        if profile and record.gpu and record.gpu_hit_rate is None:
            typer.echo(
                "\nno profile: it tells of the CPU's kernels, and all is computed on the GPU"
            )
        elif profile:
            typer.echo("\n".join(["", *profile_lines(record.profile)]))
