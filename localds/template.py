"""Chat templates: from messages to the text of a prompt.

A template is a program that comes with the model file, so it runs sandboxed in a process of its own
with limits on time, memory, files and processes.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal

from localds.template_process import ProcessError, TemplateProcess

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from localds.gguf.metadata import TypedMetadata
    from localds.tokenizer import Tokenizer

Origin = Literal["file", "deepseek", "plain"]

TIMEOUT_SECONDS: Final = 2.0
_KEY = "tokenizer.chat_template"

# The format of DeepSeek V3 and its kin, for files that hold their tokens but no template.
_DEEPSEEK = """\
{{ bos_token }}
{%- for message in messages if message.role == 'system' %}
{{- '\n\n' if not loop.first }}{{ message.content }}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<\uff5cUser\uff5c>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<\uff5cAssistant\uff5c>' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<\uff5cAssistant\uff5c>' }}
{%- endif %}"""

# The format of DeepSeek V2, which needs no tokens of its own.
_PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- 'User: ' + message.content + '\n\n' }}
{%- elif message.role == 'assistant' %}
{{- 'Assistant: ' + message.content + eos_token }}
{%- elif message.role == 'system' %}
{{- message.content + '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:' }}
{%- endif %}"""


class TemplateError(ValueError):
    """A chat template that is broken, refuses the conversation, or oversteps its limits."""


class ChatTemplate:
    """A chat template. Safe to share between threads.

    `source` is jinja text, `bos` and `eos` the texts that it sees as bos_token and eos_token.
    `origin` tells where it is from: the file, or one of ours ("deepseek", "plain").
    """

    def __init__(self, source: str, bos: str, eos: str, *, origin: Origin = "file") -> None:
        self.source = source
        self.bos = bos
        self.eos = eos
        self.origin: Origin = origin
        self._lock = threading.Lock()
        self._process: TemplateProcess | None = None
        self._compiled = False
        self._finalizer: weakref.finalize[[], ChatTemplate] | None = None

    def start(self) -> None:
        """Start the process without waiting for it, so that the first `render` is quick.

        Where it cannot be started, `render` tells.
        """
        with self._lock, suppress(ProcessError):
            self._started()

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **extra: object,
    ) -> str:
        """Return the prompt for `messages`, each with "role" and "content".

        `extra` are further variables, such as `enable_thinking`. Whatever is passed must be
        expressible in JSON. Raises `TemplateError`.
        """
        variables = {
            "bos_token": self.bos,
            "eos_token": self.eos,
            **extra,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
        }
        with self._lock:
            return self._render(variables)

    def close(self) -> None:
        """End the process; a later `render` starts another."""
        with self._lock:
            self._stop()

    def _render(self, variables: dict[str, object]) -> str:
        request: dict[str, Any] = {"variables": variables}
        try:
            process = self._started()
            if not self._compiled:
                request["source"] = self.source
            reply = process.ask(request, TIMEOUT_SECONDS)
        except ProcessError as error:
            self._stop()
            raise TemplateError(f"the chat template was stopped: {error}") from None
        except (TypeError, ValueError) as error:
            raise TemplateError(
                f"the chat template cannot be given the messages: {error}"
            ) from None
        except BaseException:
            # Interrupted: the process was ended, for its reply may be half read.
            self._stop()
            raise
        if "error" in reply:
            raise _error(reply)
        self._compiled = True
        return str(reply.get("text", ""))

    def _started(self) -> TemplateProcess:
        if self._process is None:
            self._process = TemplateProcess()
            self._compiled = False
            # Nobody has to call close: the process goes when the template does.
            self._finalizer = weakref.finalize(self, self._process.close)
        return self._process

    def _stop(self) -> None:
        self._process = None
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None


def template_for(
    gguf: TypedMetadata, tokenizer: Tokenizer, name: str | None = None
) -> ChatTemplate:
    """Return the file's chat template, or the one called `name` of several.

    A file without one gets DeepSeek's format where the vocabulary has its tokens, else plain text;
    `origin` tells. Raises `TemplateError` for a name that the file does not have.
    """
    bos = tokenizer.bos_text
    eos = tokenizer.eos_text
    key = f"{_KEY}.{name}" if name else _KEY
    source = gguf.text(key, None)
    if source is not None:
        return ChatTemplate(source, bos, eos)
    if name:
        names = [
            key.removeprefix(f"{_KEY}.") for key in gguf.metadata if key.startswith(f"{_KEY}.")
        ]
        has = f"it has {', '.join(sorted(names))}" if names else "it has no named ones"
        raise TemplateError(f"the file has no chat template called {name!r}; {has}")
    if all(
        tokenizer.token_id(f"<\uff5c{role}\uff5c>") is not None for role in ("User", "Assistant")
    ):
        return ChatTemplate(_DEEPSEEK, bos, eos, origin="deepseek")
    return ChatTemplate(_PLAIN, bos, eos, origin="plain")


def _error(reply: dict[str, Any]) -> TemplateError:
    where = f" (line {reply['line']} of the template)" if reply.get("line") else ""
    message = f": {reply['message']}" if reply.get("message") else ""
    opening = {
        "syntax": "the chat template has a syntax error",
        "refusal": "the chat template refuses the conversation",
        "security": "the chat template does what it must not do",
        "memory": "the chat template needs too much memory",
        "recursion": "the chat template calls itself without end",
        "output": "the chat template does not end",
    }.get(reply["error"], "the chat template failed")
    return TemplateError(f"{opening}{message}{where}")
