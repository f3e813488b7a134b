"""`localds finetune`: train a low-rank adapter on top of a quantized model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localds.commands.common import MODEL_HELP, Device, clear_errors, say

if TYPE_CHECKING:
    from localds.finetune.options import Options
    from localds.finetune.run import Finished, Job

_EXAMPLE_OUTPUT = Path("localds-example")


def finetune(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="Chats or texts: a .jsonl, .json or .txt file, a folder, or a data set of the hub "
            "(owner/name[:PATTERN]). Repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to make for the adapter.")
    ] = None,
    valid: Annotated[
        str | None, typer.Option("--valid", help="Data to evaluate on, named like --data.")
    ] = None,
    eval_share: Annotated[
        float, typer.Option("--eval-share", help="Without --valid, the share kept for evaluation.")
    ] = 0.05,
    method: Annotated[str, typer.Option("--method", help="lora, rslora or dora.")] = "lora",
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the adapters.")] = 16,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Scale times rank. Default: twice the rank.")
    ] = None,
    dropout: Annotated[float, typer.Option("--dropout", help="On the adapters' input.")] = 0.0,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            help="What is adapted, by commas: attention, ffn, all (both), experts, router, or "
            "names such as q_proj. Default: attention without kv_b_proj.",
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Passes over the data. Default: 1.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "--iters", help="Steps of the optimizer instead.")
    ] = None,
    lr: Annotated[
        float, typer.Option("--lr", "--learning-rate", help="The highest learning rate.")
    ] = 2e-4,
    schedule: Annotated[
        str, typer.Option("--schedule", help="cosine, linear or constant.")
    ] = "cosine",
    warmup: Annotated[
        float, typer.Option("--warmup", help="The share of the steps in which it rises.")
    ] = 0.03,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="adamw, or adamw8bit: states in 8 bits.")
    ] = "adamw",
    weight_decay: Annotated[float, typer.Option("--weight-decay")] = 0.0,
    clip: Annotated[
        float, typer.Option("--clip", help="The highest norm of gradients, 0 for any.")
    ] = 1.0,
    batch: Annotated[
        int,
        typer.Option(
            "--batch", "-b", "--batch-size", help="Rows in a step; as many at once as fit."
        ),
    ] = 8,
    length: Annotated[
        int, typer.Option("--length", "-l", "--max-seq-length", help="Tokens in a row.")
    ] = 2048,
    curriculum: Annotated[
        str | None,
        typer.Option("--curriculum", help="Rising lengths instead, such as 512,2048,8192."),
    ] = None,
    train_on: Annotated[
        str, typer.Option("--train-on", help="What counts of a chat: assistant, last or all.")
    ] = "assistant",
    no_packing: Annotated[bool, typer.Option("--no-packing", help="One example in a row.")] = False,
    no_checkpointing: Annotated[
        bool,
        typer.Option("--no-checkpointing", help="Faster, with more memory. Default: what fits."),
    ] = False,
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", help="Steps between evaluations. Default: five in all."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option("--patience", help="Stop after so many evaluations without a better one."),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option("--save-every", help="Steps between checkpoints. Default: 10 minutes."),
    ] = None,
    keep: Annotated[int, typer.Option("--keep", help="Checkpoints that are kept.")] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    device: Device = "auto",
    vram: Annotated[
        str | None, typer.Option("--vram", help="Take no more GPU memory than this, e.g. 8GiB.")
    ] = None,
    ram: Annotated[
        str | None, typer.Option("--ram", help="Take no more memory than this, e.g. 12GiB.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard's logs, too.")
    ] = False,
    no_gguf: Annotated[
        bool, typer.Option("--no-gguf", help="Write no GGUF adapter beside PEFT's.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data, plan memory, and stop.")
    ] = False,
    example: Annotated[
        bool,
        typer.Option(
            "--example", help="Teach the built-in model to reply with JSON: it takes minutes."
        ),
    ] = False,
) -> None:
    """Fine-tune a model: train a low-rank adapter on top of its quantized weights.

    The adapter is written in PEFT's form and as a GGUF adapter; `localds chat MODEL --adapter OUT`
    uses it. Ctrl-C saves, and --resume goes on. docs/finetune.md tells of the data.
    """
    with clear_errors():
        # Before anything that imports MLX.
        from localds.finetune.device import find_device

        find_device(device)
        if example:
            if model is not None or data:
                raise typer.BadParameter("--example has its own model and data")
            _example(output or _EXAMPLE_OUTPUT, resume)
            return
        if model is None or not data or output is None:
            raise typer.BadParameter("give MODEL, --data and --output, or --example alone")
        if epochs is not None and steps is not None:
            raise typer.BadParameter("--epochs and --steps exclude each other")
        options = _options(
            adapter={
                "rank": rank,
                "alpha": 2.0 * rank if alpha is None else alpha,
                "method": method,
                "dropout": dropout,
            },
            targets=targets,
            training={
                "epochs": 1.0 if epochs is None else epochs,
                "steps": steps,
                "learning_rate": lr,
                "schedule": schedule,
                "warmup": warmup,
                "optimizer": optimizer,
                "weight_decay": weight_decay,
                "clip": clip or None,
                "seed": seed,
                "evaluate_every": eval_every,
                "patience": patience,
                "checkpoint_every": save_every,
                "keep_checkpoints": keep,
                "tensorboard": tensorboard,
            },
            lengths=curriculum or str(length),
            run={
                "batch": batch,
                "train_on": train_on,
                "packing": not no_packing,
                "evaluation_share": eval_share,
                "checkpointing": False if no_checkpointing else None,
                "device": device,
                "vram": vram,
                "ram": ram,
                "gguf": not no_gguf,
            },
        )
        _finetune(model, data, output, options, valid=valid, resume=resume, dry_run=dry_run)


def _example(output: Path, resume: bool) -> None:
    from localds.commands.finetune_example import run_example

    try:
        run_example(output, resume=resume)
    except KeyboardInterrupt:
        say(_stopped(output))
        raise typer.Exit(130) from None


def _options(
    adapter: dict[str, Any],
    targets: str | None,
    training: dict[str, Any],
    lengths: str,
    run: dict[str, Any],
) -> Options:
    """The options of a run; what is wrong with one is a mistake on the command line."""
    from localds.finetune.config import AdapterConfig
    from localds.finetune.groups import parse_targets
    from localds.finetune.loop import TrainSettings
    from localds.finetune.options import Options

    try:
        if targets is not None:
            adapter["targets"] = parse_targets(targets)
        return Options(
            adapter=AdapterConfig(**adapter),
            training=TrainSettings(**training),
            lengths=_lengths(lengths),
            **run,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"lengths {text!r} are no numbers; write them like 512,2048") from None


def _finetune(
    model: str,
    data: list[str],
    output: Path,
    options: Options,
    *,
    valid: str | None,
    resume: bool,
    dry_run: bool,
) -> None:
    from localds.commands.finetune_progress import TrainingProgress, preparing
    from localds.finetune.plan import describe_plan
    from localds.finetune.run import prepare

    tell = typer.echo if dry_run else say
    try:
        with preparing() as on_progress:
            job = prepare(
                model,
                data,
                output,
                options,
                valid=valid,
                resume=resume,
                on_progress=on_progress,
            )
        for line in job.report.lines():
            tell(line)
        tell(describe_plan(job.plan))
        if dry_run:
            return
        say(f"{job.steps:,} steps; loading the weights")
        with TrainingProgress() as progress:
            finished = job.run(progress.show)
    except KeyboardInterrupt:
        say(_stopped(output))
        raise typer.Exit(130) from None
    if finished.reason == "interrupted":
        say(_stopped(output, finished))
        raise typer.Exit(130)
    report(job, finished, model)


def report(job: Job, finished: Finished, model: str) -> None:
    """Say what was written, and how to use it."""
    assert finished.written is not None  # noqa: S101
    for note in finished.written.notes:
        say(f"localds: {note}")
    early = " (no improvement)" if finished.reason == "no improvement" else ""
    typer.echo(f"{job.output}: the adapter after step {finished.step} of {job.steps}{early}")
    if finished.curve is not None:
        typer.echo(f"loss curve: {finished.curve}")
    used = shlex.join(["localds", "chat", model, "--adapter", str(job.output)])
    typer.echo(f"use it: {used}")


def _stopped(output: Path, finished: Finished | None = None) -> str:
    """What an interrupted run leaves, and how it goes on."""
    from localds.finetune.run import TRAINING

    saved = any((output / TRAINING).glob("step-*.safetensors"))
    if not saved:
        return "interrupted before training began"
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    where = "" if finished is None else f" after step {finished.step}"
    command = shlex.join(["localds", *arguments, "--resume"])
    return f"interrupted{where}: what is done is kept in {output}; go on with: {command}"
