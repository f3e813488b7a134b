"""The two themes of the chat app, and the names of all that can be chosen.

One accent, on calm backgrounds. Body text has a contrast of at least 7:1 on every background,
muted text and the signal colours at least 4.5:1. The colours are also chosen for terminals of 16
colours, where each is drawn as its nearest neighbour: text, muted text, accent, error, warning and
success stay apart there.
"""

from __future__ import annotations

from textual.theme import BUILTIN_THEMES, Theme

# "auto" is black or white, whichever is farther from the background that it stands on.
_SHARED = {
    "text": "auto 92%",
    "text-muted": "auto 68%",
    "text-disabled": "auto 62%",
    "block-cursor-text-style": "bold",
    "button-focus-text-style": "bold reverse",
    "input-cursor-text-style": "none",
}

DARK = Theme(
    name="localds-dark",
    dark=True,
    primary="#58a6ff",
    secondary="#58a6ff",
    accent="#58a6ff",
    foreground="#e6e8eb",
    background="#14171b",
    surface="#1a1e23",
    panel="#1f242a",
    boost="#252b32",
    error="#ff5c57",
    warning="#e3b341",
    success="#6fd684",
    variables=_SHARED
    | {
        "border": "#58a6ff",
        "border-blurred": "#4a525e",
        "foreground-muted": "#a4acb6",
        "block-cursor-foreground": "#0b0e12",
        "block-cursor-background": "#58a6ff",
        "block-cursor-blurred-foreground": "#e6e8eb",
        "block-cursor-blurred-background": "#3a424d",
        "block-hover-background": "#252a31",
        "input-selection-background": "#2f5f99",
        "screen-selection-background": "#2f5f99",
        "footer-background": "#1f242a",
        "footer-key-foreground": "#58a6ff",
        "scrollbar": "#4a525e",
        "scrollbar-hover": "#667080",
        "scrollbar-active": "#58a6ff",
        "scrollbar-background": "#1a1e23",
    },
)

LIGHT = Theme(
    name="localds-light",
    dark=False,
    primary="#0a4fb3",
    secondary="#0a4fb3",
    accent="#0a4fb3",
    foreground="#1b1f24",
    background="#fbfbfa",
    surface="#f3f4f5",
    panel="#eaecef",
    boost="#e2e5e9",
    error="#b3261e",
    warning="#805500",
    success="#006b1a",
    variables=_SHARED
    | {
        "border": "#0a4fb3",
        "border-blurred": "#a5adb8",
        "foreground-muted": "#505862",
        "block-cursor-foreground": "#ffffff",
        "block-cursor-background": "#0a4fb3",
        "block-cursor-blurred-foreground": "#1b1f24",
        "block-cursor-blurred-background": "#c3cad2",
        "block-hover-background": "#dfe3e8",
        "input-selection-background": "#a8c7f0",
        "screen-selection-background": "#a8c7f0",
        "footer-background": "#eaecef",
        "footer-key-foreground": "#0a4fb3",
        "scrollbar": "#a5adb8",
        "scrollbar-hover": "#8b949e",
        "scrollbar-active": "#0a4fb3",
        "scrollbar-background": "#f3f4f5",
    },
)

THEMES = (DARK, LIGHT)


def theme_names() -> tuple[str, ...]:
    """Every theme that can be chosen: ours, then those that come with Textual."""
    return (*(theme.name for theme in THEMES), *BUILTIN_THEMES)
