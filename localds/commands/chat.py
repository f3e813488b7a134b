"""`localds chat`: a conversation in the terminal, or one answer with -p."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localds.commands.common import (
    MODEL_HELP,
    Adapters,
    CacheType,
    Context,
    CpuMoe,
    Device,
    NCpuMoe,
    Ram,
    Threads,
    Vram,
    adapter_options,
    clear_errors,
    say,
)

if TYPE_CHECKING:
    from localds.catalog.resolve import Found
    from localds.model import Model
    from localds.session import Session


def chat(
    command: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help=f"{MODEL_HELP} Default: the one used last.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Answer this once. Piped input is added after it."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, help="Longest reply in tokens.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", "--temp", min=0, help="0 takes the likeliest token.")
    ] = 0.6,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Sample from the k likeliest; 0 for all.")
    ] = 40,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0, max=1, help="Sample from this share of probability.")
    ] = 0.95,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p", min=0, max=1, help="Drop tokens below this share of the likeliest."
        ),
    ] = 0.05,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1 discourages repetition.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Subtracted for tokens seen already.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option("--frequency-penalty", help="Subtracted for each time seen.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Same seed, same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End the reply at this text. Repeatable.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", help="ID=BIAS, added to a token's logit. Repeatable."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without a template.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Chat line by line instead of in the app.")
    ] = False,
    context: Context = None,
    cache_type: CacheType = "f16",
    threads: Threads = None,
    ram: Ram = None,
    device: Device = "auto",
    vram: Vram = None,
    cpu_moe: CpuMoe = False,
    n_cpu_moe: NCpuMoe = None,
    adapters: Adapters = None,
) -> None:
    """Chat with a model: in an app that fills the terminal, or line by line with --plain.

    With -p, or piped input, print one answer and exit. What a model's file recommends for sampling
    goes before the defaults below.
    """
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "logit_bias": _parse_bias(logit_bias or []),
    }
    with clear_errors():
        question = _with_piped_input(prompt)
        from localds.catalog.resolve import find_model, remember_choice
        from localds.commands.loading import load_model
        from localds.recommended import recommended_sampling

        found = find_model(model)
        if question is None and not plain and not raw and _is_terminal():
            _open_app(model, command)
            return
        if model is None:
            say(_announce(found))
        with load_model(
            found.path,
            ram=ram,
            device=device,
            vram=vram,
            cpu_moe=cpu_moe,
            n_cpu_moe=n_cpu_moe,
            threads=threads,
            context=context,
            cache_type=cache_type,
            adapters=adapter_options(adapters),
        ) as loaded:
            remember_choice(found)
            sampling |= _not_given(command, recommended_sampling(loaded.gguf))
            options = {"max_tokens": max_tokens, "stop": tuple(stop or ()), **sampling}
            session = loaded.session(context, cache_type=cache_type)
            if question is None:
                _converse(loaded, session, system, options)
            else:
                _answer(session, question, system, options, raw=raw)


def _is_terminal() -> bool:
    """Whether the app can be shown; Textual draws on stderr."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


def _open_app(model: str | None, command: typer.Context) -> None:
    """Open the chat app, with the options that were given."""
    # Terminals send an escape sequence at once; waiting 100 ms for its rest delays Esc itself.
    os.environ.setdefault("ESCDELAY", "40")
    from tui.app import run
    from tui.launch import Launch
    from tui.settings import BY_KEY

    given = {name: value for name, value in command.params.items() if _is_given(command, name)}
    bias = _parse_bias(given.get("logit_bias") or [])
    run(
        Launch(
            model=model,
            given={key: BY_KEY[key].check(value) for key, value in given.items() if key in BY_KEY},
            sampling={"logit_bias": bias} if bias else {},
        )
    )


def _is_given(command: typer.Context, name: str) -> bool:
    source = command.get_parameter_source(name)
    # By its name: typer has a copy of click of its own, or click's, by its version.
    return source is not None and source.name == "COMMANDLINE"


def _announce(found: Found) -> str:
    """Which model it is where none was named, and of the demo, how to get a real one."""
    from localds.catalog.known import SUGGESTION
    from localds.catalog.resolve import How

    match found.how:
        case How.DEMO:
            remedy = f"localds list, then localds pull {SUGGESTION}"
        case How.DEMO_AMONG_OTHERS:
            remedy = "localds chat NAME, with a name from localds list"
        case _:
            return f"localds: using {found.title}, {found.how}"
    return (
        f"localds: {found.how}, so this is the built-in demo, a guide to localds; "
        f"for a real model: {remedy}"
    )


def _not_given(command: typer.Context, recommended: dict[str, Any]) -> dict[str, Any]:
    """What is recommended, without the options that the command line has."""
    return {name: value for name, value in recommended.items() if not _is_given(command, name)}


def _parse_bias(entries: list[str]) -> dict[int, float]:
    bias = {}
    for entry in entries:
        token, _, value = entry.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise typer.BadParameter(
                f"--logit-bias {entry!r}: write a token id and a number, like 42=-1.5"
            ) from None
    return bias


def _with_piped_input(prompt: str | None) -> str | None:
    """The prompt with piped input after it; None where there is neither, and so a person."""
    if sys.stdin is None or sys.stdin.isatty():
        return prompt
    piped = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    text = "\n\n".join(part for part in (prompt, piped.strip("\n")) if part)
    if not text:
        raise ValueError("nothing to answer: give a prompt with -p, or pipe one in")
    return text


def _answer(
    session: Session, question: str, system: str | None, options: dict[str, Any], *, raw: bool
) -> None:
    """Print the answer to stdout; thinking and figures go to stderr."""
    from tui.plain import print_reply, print_stats

    prompt: Any = question if raw else [*_system_message(system), _message("user", question)]
    interrupted = print_reply(session.generate(prompt, **options)).interrupted
    print_stats(session.stats)
    if interrupted:
        raise typer.Exit(130)


def _converse(model: Model, session: Session, system: str | None, options: dict[str, Any]) -> None:
    from tui.plain import converse

    converse(model, session, _system_message(system), options)


def _system_message(system: str | None) -> list[dict[str, str]]:
    return [_message("system", system)] if system else []


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
