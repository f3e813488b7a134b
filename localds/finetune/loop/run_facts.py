"""What a run was begun with, and whether a resumed one is the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from localds.finetune.loop.errors import TrainingError
from localds.finetune.loop.settings import MAY_CHANGE

if TYPE_CHECKING:
    from pathlib import Path

    from localds.finetune.loop.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class RunFacts:
    """All that decides a run's losses."""

    settings: TrainSettings
    steps: int
    model: str
    data: str
    evaluation: str | None

    def to_json(self) -> dict[str, Any]:
        """As it is kept in checkpoints."""
        return {
            "settings": asdict(self.settings),
            "total_steps": self.steps,
            "model": self.model,
            "data": self.data,
            "evaluation": self.evaluation,
        }

    def check(self, saved: dict[str, Any], path: Path) -> None:
        """Raise `TrainingError` naming what differs from the run that saved a checkpoint."""
        changed = [
            f"{name} (was {saved['settings'].get(name)!r}, is {value!r})"
            for name, value in asdict(self.settings).items()
            if name not in MAY_CHANGE and saved["settings"].get(name) != value
        ]
        now = self.to_json()
        for key, words in (
            ("model", "the model or its adapters"),
            ("data", "the training data"),
            ("evaluation", "the held-out data"),
        ):
            if saved[key] != now[key]:
                changed.append(words)
        if not changed and saved["total_steps"] != self.steps:
            changed.append(f"the steps (were {saved['total_steps']}, are {self.steps})")
        if changed:
            raise TrainingError(
                f"resume: {path.parent} was begun differently: {', '.join(changed)} changed; give "
                "what was given then, or train into another folder"
            )
