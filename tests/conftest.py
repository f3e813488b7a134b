"""Small complete models, and folders in place of the user's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from checkpoints import VARIANTS, golden_config, golden_shapes, make_weights, write_checkpoint
from hub_home import home, model_hub

from convert import convert_checkpoint
from localds.catalog.resolve import DEMO

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["home", "model_hub"]

# `training` is not installed. At the end, so that the installed localds is what is tested.
sys.path.append(str(Path(__file__).parent.parent))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave thorough tests out unless they are asked for."""
    if "thorough" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="one more of what others show; run pytest -m thorough")
    for item in items:
        if item.get_closest_marker("thorough"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders for settings and state in place of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "STATE", "CACHE"):
            patch.setenv(f"XDG_{name}_HOME", str(tmp_path_factory.mktemp(name.lower())))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of the "v3" variant: random weights, a byte-level vocabulary, no template."""
    folder = tmp_path_factory.mktemp("tiny")
    variant = VARIANTS["v3"]
    weights = make_weights(golden_shapes("v3"), variant.seed)
    write_checkpoint(folder / "checkpoint", golden_config("v3"), weights)
    path = folder / "tiny.gguf"
    convert_checkpoint(folder / "checkpoint", path, pre=variant.pre)
    return path


@pytest.fixture(scope="session")
def guide_path() -> Path:
    """The model in the box: trained, with real routing and real text."""
    return DEMO
