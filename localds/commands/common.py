"""What the commands share: options, and errors as one message."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODEL_HELP = "A GGUF file (of a split one, the first part), or an installed model: NAME[:QUANT]."
ModelFile = Annotated[str, typer.Argument(help=MODEL_HELP)]
ReadText = Annotated[Path, typer.Argument(help="A UTF-8 text like what the model will read.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, max=1024, help="Threads. Default: physical cores."),
]
Context = Annotated[
    int | None,
    typer.Option("--context", "-c", min=1, help="Context in tokens. Default: at most 8192."),
]
CacheType = Annotated[
    str, typer.Option("--cache-type", help="Type of the latent cache: f16, q8_0 or f32.")
]
Ram = Annotated[
    str | None,
    typer.Option(
        "--ram", help="Take no more memory than this, e.g. 12GiB; other experts stay on disk."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or gpu.")]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        help="Take no more GPU memory than this, e.g. 8GiB; other experts stay in RAM or on disk.",
    ),
]
CpuMoe = Annotated[
    bool, typer.Option("--cpu-moe", "-cmoe", help="Keep all routed experts off the GPU.")
]
NCpuMoe = Annotated[
    int | None,
    typer.Option(
        "--n-cpu-moe",
        "-ncmoe",
        min=0,
        help="Keep the routed experts of the first N layers off the GPU.",
    ),
]

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="PATH or PATH:SCALE of a fine-tuned adapter, PEFT's or GGUF. Repeatable.",
    ),
]


def fail(message: object) -> NoReturn:
    """Print one message to stderr and exit with status 1."""
    typer.echo(f"localds: error: {message}", err=True)
    raise typer.Exit(1)


def say(line: str) -> None:
    """Print one line to stderr."""
    typer.echo(line, err=True)


def adapter_options(named: Sequence[str] | None) -> list[tuple[str | Path, float]]:
    """What `localds.load` takes as adapters, from the options' texts."""
    from localds.adapters import parse_adapter

    return [parse_adapter(text) for text in named or ()]


def check_output(output: Path, model: Path) -> None:
    """Fail before the work rather than after it."""
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}; create it first")
    if output.is_dir():
        raise ValueError(f"{output} is a folder; give the name of a file")
    if output.exists() and output.samefile(model):
        raise ValueError(f"{output} is the model; give another name with --output")


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors that a user can mend into one message and exit status 1.

    `ValueError` is the base of the library's own errors (files, templates, budgets, contexts);
    `OSError` and `MemoryError` come from the machine.
    """
    try:
        yield
    except BrokenPipeError:
        # Whoever read our output has left: nothing to tell anybody.
        sys.stderr.close()
        raise typer.Exit(1) from None
    except MemoryError:
        fail("not enough memory; use a smaller context (--context) or a smaller model")
    except (ValueError, OSError) as error:
        fail(error)
