"""Rules are pure: scores in, a reason to drop the sample out, or None to keep it.

Rejected rows never come here: a filter speaks about pictures that are fine and unwanted. Captions
are cleaned here too, by the same kind of rule: what was changed comes back as flags.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Scores = Mapping[str, Any]
Rule = Callable[[Scores], str | None]

_BIDI_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069]")


def aspect(longest: float) -> Rule:
    """Drops pictures more than `longest` times as long as wide, either way."""
    return lambda scores: "aspect" if scores["aspect"] > longest else None


def too_small(min_side: int) -> Rule:
    """Drops pictures whose shorter side was below `min_side` pixels before any resize."""

    def rule(scores: Scores) -> str | None:
        return (
            "too_small"
            if min(scores["original_width"], scores["original_height"]) < min_side
            else None
        )

    return rule


def first_reason(rules: Sequence[Rule], scores: Scores) -> str | None:
    """The reason of the first rule that objects."""
    return next((reason for rule in rules if (reason := rule(scores))), None)


def clean_caption(text: str, limit: int) -> tuple[str, tuple[str, ...]]:
    """A caption in NFC on one line, at most `limit` characters, and flags for what was lost.

    Control characters (NUL, ANSI escapes) and bidirectional overrides go, white space collapses;
    scripts of any direction stay. "caption_cut": it was too long; "caption_replaced": it held bytes
    that are no text.
    """
    flags: list[str] = []
    if len(text) > 4 * limit:  # before anything that costs time per character
        text = text[: 4 * limit]
        flags.append("caption_cut")
    if not (text.isascii() and text.isprintable()):
        text = unicodedata.normalize("NFC", _BIDI_CONTROLS.sub("", text))
        # surrogates (Cs) are halves of characters: JSON may carry them, UTF-8 may not
        text = "".join(_CLASS.get(unicodedata.category(char), char) for char in text)
        if "\ufffd" in text:
            flags.append("caption_replaced")
    text = " ".join(text.split())
    if len(text) > limit:
        text = text[:limit].rstrip()
        flags.append("caption_cut")
    return text, tuple(sorted(set(flags)))


_CLASS = {"Cc": " ", "Cs": "\ufffd"}


_CONTROL = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys(range(128, 160), "\ufffd"),
}


def visible(value: Any) -> Any:
    """Plain text without control characters: an escape sequence reads as \u241b[31m and does
    nothing, on a page or in a terminal. What is no text stays as it is.
    """
    return value.translate(_CONTROL) if type(value) is str else value
