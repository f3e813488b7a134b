"""localds: run DeepSeek-family language models on one desktop.

model = localds.load("model.gguf")
session = model.session(context=8192)
for piece in session.generate("Once upon a time", max_tokens=64):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localds.model import Model, load
    from localds.session import Piece, Session

__version__ = "0.1.0"
__all__ = ["Model", "Piece", "Session", "__version__", "load"]

_HOMES = {
    "Model": "localds.model",
    "load": "localds.model",
    "Piece": "localds.session",
    "Session": "localds.session",
}


def __getattr__(name: str) -> object:
    # Imported on first use: `localds --help` must not wait for numpy and the kernels.
    if name not in _HOMES:
        raise AttributeError(f"module 'localds' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
