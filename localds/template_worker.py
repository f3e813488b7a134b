"""The process in which chat templates run: a program of its own, started by template_process.py.

A template comes with the model file, from whoever made it, and is a program. Jinja's sandbox keeps
it from Python's internals; limits on memory, time, files and processes keep it from the machine
even so. Requests and replies are frames: a little-endian u32 length, then JSON. Nothing of localds
is imported, so that the process is ready quickly.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import threading
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

# The caller's search path; the process itself is started without one.
sys.path += sys.argv[1:]

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError, UndefinedError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from types import TracebackType

    from jinja2 import Template
    from jinja2.parser import Parser

MAX_OUTPUT = 4 << 20  # characters: more than any context holds
MEMORY_EXIT = 77  # exit status when `watch` ended the process
_MAX_ADDRESS_SPACE = 512 << 20  # bytes
_MAX_GROWTH = 320 << 20  # bytes of resident memory
_CPU_SECONDS = 3  # for one request, where nobody is left to time it
_LENGTH = struct.Struct("<I")


class RefusalError(TemplateRuntimeError):
    """What a template raises by itself, with `raise_exception`."""


class GenerationTag(Extension):
    """Lets `{% generation %}` through, which marks the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        """Replace the tag by what it encloses."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)  # noqa: A006
    del environment.globals["lipsum"]  # no use in a prompt
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> NoReturn:
    raise RefusalError(str(message))


class OutputError(Exception):
    """The text grew beyond `MAX_OUTPUT` characters."""


def render(template: Template, variables: dict[str, Any]) -> str:
    """Run the template; raises `OutputError` and whatever the template raises."""
    parts = []
    length = 0
    for part in template.generate(variables):
        length += len(part)
        if length > MAX_OUTPUT:
            raise OutputError(f"it writes more than {MAX_OUTPUT:,} characters")
        parts.append(part)
    return "".join(parts)


def describe(error: BaseException) -> dict[str, Any]:
    """The reply about an error: its kind, a sentence, and the template's line where known."""
    kinds = {
        TemplateSyntaxError: "syntax",
        RefusalError: "refusal",
        SecurityError: "security",
        MemoryError: "memory",
        RecursionError: "recursion",
        OutputError: "output",
        UndefinedError: "undefined",
    }
    kind = next((name for cls, name in kinds.items() if isinstance(error, cls)), "runtime")
    text = str(error)[:500]
    if kind == "runtime":
        text = f"{type(error).__name__}: {text}"
    line = error.lineno if isinstance(error, TemplateSyntaxError) else _line(error.__traceback__)
    return {"error": kind, "message": text, "line": line}


def _line(traceback: TracebackType | None) -> int | None:
    """The innermost line of the template, which jinja puts into the traceback."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def limit_resources() -> None:
    """Take away what a template does not need. A platform may lack some of the limits."""
    limits = [
        (resource.RLIMIT_AS, _MAX_ADDRESS_SPACE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),  # open ones stay open
    ]
    for kind, value in limits:
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):
            continue


def limit_cpu_time() -> None:
    """End the process once it has used `_CPU_SECONDS` more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soon = int(used.ru_utime + used.ru_stime) + 1 + _CPU_SECONDS
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or soon < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soon, hard))


def open_memory_figures() -> int | None:
    """Linux's file with this process's memory; None elsewhere."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None


def resident_bytes(figures: int | None) -> int:
    """Bytes of memory in use; at most so far, where `figures` is None.

    On Linux the largest use so far begins with that of the program that started us.
    """
    if figures is not None:
        return int(os.pread(figures, 128, 0).split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def watch(figures: int | None) -> NoReturn:
    """End the process when its caller is gone, or when its memory grows too much.

    The latter is for systems whose own limit does nothing.
    """
    caller = os.getppid()
    start = resident_bytes(figures)
    while os.getppid() == caller:
        if resident_bytes(figures) - start > _MAX_GROWTH:
            os._exit(MEMORY_EXIT)
        time.sleep(0.02)
    os._exit(0)


def read_frame() -> dict[str, Any] | None:
    """The next request; None at the end."""
    header = sys.stdin.buffer.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    frame: dict[str, Any] = json.loads(sys.stdin.buffer.read(*_LENGTH.unpack(header)))
    return frame


def write_frame(reply: dict[str, Any]) -> None:
    """Send a reply."""
    data = json.dumps(reply).encode()
    sys.stdout.buffer.write(_LENGTH.pack(len(data)) + data)
    sys.stdout.buffer.flush()


def load_everything(environment: ImmutableSandboxedEnvironment) -> None:
    """Make jinja import what it loads on first use, while files are still within reach."""
    environment.from_string("{{ [1] | tojson }}{{ strftime_now('%Y') }}").render()
    for broken in ("{{ missing.attribute }}", "{% if %}"):
        try:
            environment.from_string(broken).render()
        except TemplateError as error:
            describe(error)


def main() -> None:
    """Announce readiness, then answer requests until there are no more.

    A request has "source", a template to compile, or "variables" to render the last one with, or
    both; the reply has "text" or "error".
    """
    environment = make_environment()
    load_everything(environment)
    # A thread counts as a process where those are limited, so it comes first.
    threading.Thread(target=watch, args=(open_memory_figures(),), daemon=True).start()
    limit_resources()
    write_frame({})
    template = environment.from_string("")
    while (request := read_frame()) is not None:
        limit_cpu_time()
        try:
            if "source" in request:
                template = environment.from_string(request["source"])
            reply = {"text": render(template, request.get("variables", {}))}
        except Exception as error:
            reply = describe(error)
        write_frame(reply)


if __name__ == "__main__":
    main()
    os._exit(0)  # nothing to tidy up, and the watching thread cannot be joined
