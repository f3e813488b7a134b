"""`localds convert`: a checkpoint, or a GGUF file, to a quantized GGUF file."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localds.commands.common import Threads, adapter_options, clear_errors, say

if TYPE_CHECKING:
    from convert import Job
    from convert.source import Source

DEFAULT_RECIPE = "Q4_K_M"
_WORST = 10


def convert(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint folder, a GGUF file, or a hub name: owner/name[@rev]."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: NAME-TYPE.gguf here.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="A preset such as Q4_K_M (the default), or a size: fit:12GiB. With --merge, "
            "the default is the types of the file.",
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--merge",
            help="PATH or PATH:SCALE of an adapter to merge into the weights. Repeatable.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="REGEX=TYPE: the type of tensors by name; the last one wins."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="An importance matrix, of either form.")
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="Keep multi-token-prediction layers.")] = False,
    pre: Annotated[
        str | None, typer.Option("--pre", help="The tokenizer's splitter, if it is not recognized.")
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Start from fewer than 8 bits, too.")
    ] = False,
    split: Annotated[
        str | None, typer.Option("--split", help="Write files of at most this size, e.g. 4GiB.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a conversion that was cut off.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Afterwards, compare every tensor with the source.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    threads: Threads = None,
) -> None:
    """Convert a checkpoint, or a GGUF file, to a quantized GGUF file.

    Types: F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K_S/M/L Q4_K_S/M Q5_K_S/M Q6_K IQ4_NL
    IQ4_XS MXFP4_MOE, or fit:SIZE to choose the best types for a size. With --merge, adapters of
    `localds finetune` or PEFT become part of the weights. With --verify and an output
    that is there already (and no --force), it is only compared.
    """
    with clear_errors():
        from convert import Job, merge_adapters, open_source
        from convert.imatrix import read_importance
        from convert.plan import plan_table
        from convert.recipes import AS_STORED
        from localds import _native
        from localds.units import parse_size

        if threads:
            _native.set_threads(threads)
        most = parse_size(split) if split else None
        keep_types = bool(adapters) and recipe is None and Path(source).is_file()
        recipe = recipe or (AS_STORED if keep_types else DEFAULT_RECIPE)
        model = open_source(source, mtp=mtp, requantize=requantize, keep_types=keep_types, pre=pre)
        if adapters:
            model = merge_adapters(model, adapter_options(adapters))
        target = output or _default_output(model, recipe)
        if verify and target.exists() and not force:
            _verify(model, target)
            return
        for line in model.notes:
            say(line)
        importance = read_importance(imatrix) if imatrix else None
        if importance:
            importance.check(model.targets)
            for line in importance.notes(model.targets):
                say(line)
        job = Job.plan(
            model, target, recipe=recipe, keep=keep or (), importance=importance, split=most
        )
        say(plan_table(model.targets, job.types))
        if dry_run:
            return
        first = _run(job, resume, force)
        if verify:
            _verify(model, first)


def _default_output(model: Source, recipe: str) -> Path:
    from convert.recipes import AS_STORED

    merged = "localds.adapters" in model.metadata
    named = merged or not model.path.is_file()
    name = str(model.metadata["general.name"]) if named else model.path.stem
    stem = re.sub(r"-(F32|F16|BF16|Q8_0)$", "", name, flags=re.IGNORECASE)
    kind = recipe if recipe.lower().startswith("fit:") else recipe.upper()
    ending = "" if recipe == AS_STORED else f"-{kind}"
    return Path(re.sub(r"[^\w.-]+", "-", stem + ending) + ".gguf")


def _run(job: Job, resume: bool, force: bool) -> Path:
    """Convert, showing progress; returns the (first) file."""
    from localds.commands.conversion_progress import ConversionProgress
    from localds.units import format_size

    started = time.monotonic()
    with ConversionProgress() as progress:
        try:
            paths = job.run(resume=resume, force=force, progress=progress)
        except KeyboardInterrupt:
            progress.stop()
            say(
                f"interrupted: what is done is kept in {job.output.name}.part; "
                "run the same command with --resume to go on"
            )
            raise typer.Exit(130) from None
    seconds = time.monotonic() - started
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    read = sum(target.source_bytes for target in job.source.targets)
    typer.echo(
        f"{name}: {format_size(job.size)} in {seconds:.0f} s, {read / seconds / 1e9:.2f} GB/s"
    )
    return paths[0]


def _verify(model: Source, path: Path) -> None:
    from convert.verify import verify
    from localds.commands.conversion_progress import ConversionProgress

    checks = []
    with ConversionProgress("Comparing") as progress:
        progress.begin(sum(target.source_bytes for target in model.targets), 0)
        for target, check in zip(model.targets, verify(model, path), strict=True):
            checks.append(check)
            progress.advance(target, check.source_bytes)
    wrong = [check for check in checks if not check.plausible]
    typer.echo(
        f"{len(checks)} tensors compared with {model.path}; the largest relative errors, "
        "of a tensor and of its worst row:"
    )
    worst = sorted(checks, key=lambda check: check.error, reverse=True)[:_WORST]
    for check in wrong[:_WORST] or worst:
        mark = "" if check.plausible else "  more than rounding to this type explains"
        errors = f"{check.error:.5f}  {check.row_error:.5f}"
        typer.echo(f"  {check.name:<40}{check.kind.name:<8}{errors}{mark}")
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} tensors are not what the source holds; convert it again"
        )
