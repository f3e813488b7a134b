"""Names for several targets at once."""

from __future__ import annotations

from localds.finetune.config import ATTENTION, FEED_FORWARD, TARGETS

GROUPS = {
    "attention": ATTENTION,
    "ffn": FEED_FORWARD,
    "all": (*ATTENTION, *FEED_FORWARD),
}
"""Those of whole parts of a layer. "all" leaves out routed experts and the router."""


def parse_targets(text: str) -> tuple[str, ...]:
    """Targets of a list such as "attention,gate_proj"; raises `ValueError` for unknown names."""
    found: set[str] = set()
    for name in (part.strip() for part in text.split(",")):
        if name not in GROUPS and name not in TARGETS:
            raise ValueError(
                f"targets: {name!r} is unknown; choose from {', '.join((*GROUPS, *TARGETS))}"
            )
        found.update(GROUPS.get(name, (name,)))
    return tuple(target for target in TARGETS if target in found)


def name_targets(targets: tuple[str, ...]) -> str:
    """Targets as `parse_targets` reads them, by the name of their group if they are one."""
    for name, group in GROUPS.items():
        if targets == group:
            return name
    return ",".join(targets)
