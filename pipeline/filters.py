"""Rules are pure: scores in, a reason to drop the sample out, or None to keep it.

Rejected rows never come here: a filter speaks about pictures that are fine and unwanted. They are
stored all the same, so that other thresholds are another selection and no second reading. Captions
are cleaned here too, by the same kind of rule: what was changed comes back as flags.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

Scores = Mapping[str, Any]
"""A sample's columns in its shard's table, `caption` (the first of its captions), and the scores
of models by name."""
Rule = Callable[[Scores], str | None]

NEAR_DUPLICATES = ("keep", "apart", "drop")
COMMON = (
    *("ar", "bn", "de", "en", "es", "fa", "fr", "hi", "id", "it", "ja", "ko"),
    *("nl", "pl", "pt", "ru", "sv", "th", "tr", "uk", "ur", "vi", "zh"),
)
"""The languages that captions are likely to be in."""
_BIDI_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, kw_only=True)
class SelectionRules:
    """Which of the stored samples a version is made of. Other rules are another version with the
    same shards."""

    min_side: int = 16
    """Pictures whose shorter side had fewer pixels are filtered: `too_small`."""
    max_aspect: float = 4.0
    """Pictures more than this many times as long as wide are filtered: `aspect`."""
    min_caption: int = 1
    """Fewest characters of the first caption: `caption_short`."""
    max_caption: int = 0
    """Most characters of the first caption, `caption_long`; 0: any number."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes; a first caption in another language is filtered: `language`. Empty: any."""
    near_duplicates: Literal["keep", "apart", "drop"] = "apart"
    """Of pictures that look the same (see `dedup`), "drop" keeps the first in the order of the
    sources (`near_duplicate`). "apart" filters pictures that look the same as one that stays in
    another split (`other_split`), pair by pair: what earlier runs kept stays, and of those that one
    run brings the one with the least key, whatever their order. "keep" filters none."""
    scores: Mapping[str, tuple[float | None, float | None]] = field(
        default_factory=dict[str, tuple[float | None, float | None]]
    )
    """Score of a model -> its (least, most), None for any; the reason is its name. A sample that
    the model could not score is kept."""

    def __post_init__(self):
        object.__setattr__(self, "languages", tuple(self.languages))
        bounds = {name: _bounds(name, it) for name, it in dict(self.scores).items()}
        object.__setattr__(self, "scores", bounds)
        for name, low in {"min_side": 0, "min_caption": 0, "max_caption": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1 (a square), got {self.max_aspect}")
        if self.near_duplicates not in NEAR_DUPLICATES:
            raise ValueError(
                f"near_duplicates must be one of {', '.join(NEAR_DUPLICATES)}, "
                f"got {self.near_duplicates!r}"
            )
        if odd := [code for code in self.languages if not re.fullmatch("[a-z]{2}", code)]:
            raise ValueError(f"languages: got {odd[0]!r}, wanted ISO 639-1 codes such as 'en'")

    def rules_of_files(self) -> list[Rule]:
        """Those that need no model's score, each for one sample alone."""
        rules = [aspect(self.max_aspect), too_small(self.min_side)]
        rules.append(caption_length(self.min_caption, self.max_caption))
        return [*rules, language(self.languages)] if self.languages else rules

    def rules(self) -> list[Rule]:
        """All that look at one sample alone."""
        scores = (score(name, *bounds) for name, bounds in self.scores.items())
        return [*self.rules_of_files(), *scores]


SELECTING = tuple(it.name for it in fields(SelectionRules))


def _bounds(name: str, given: Any) -> tuple[float | None, float | None]:
    try:
        low, high = given
        if low is None or high is None or low <= high:
            return low, high
    except (TypeError, ValueError):
        pass
    raise ValueError(f"scores.{name}: got {given!r}, wanted [least, most], null for any")


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


def caption_length(fewest: int, most: int = 0) -> Rule:
    """Drops samples whose first caption has fewer characters, or more (0: any number)."""

    def rule(scores: Scores) -> str | None:
        length = len(scores["caption"])
        return "caption_short" if length < fewest else "caption_long" if 0 < most < length else None

    return rule


def language(codes: Sequence[str]) -> Rule:
    """Drops samples whose first caption is in none of these languages, as langid sees it (Lui &
    Baldwin 2012). A few words are told apart badly: give it captions of ten and more."""

    def rule(scores: Scores) -> str | None:
        return None if language_of(scores["caption"], *codes) in codes else "language"

    return rule


def language_of(text: str, *others: str) -> str:
    """ISO 639-1 code of the likeliest language, of the common ones and `others`."""
    return _identifier(*others).classify(text)[0]


@lru_cache(16)
def _identifier(*others: str) -> Any:
    from py3langid import langid  # pyright: ignore[reportMissingTypeStubs]

    library: Any = langid
    found = library.LanguageIdentifier.from_model_file(library.MODEL_FILE)
    if unknown := sorted(set(others).difference(found.labels)):
        raise ValueError(f"languages: {unknown[0]!r} is none that langid knows")
    # Of all 97 a short English caption is Latin or Norwegian as often as not.
    found.set_languages(sorted({*COMMON, *others}))
    return found


def score(name: str, least: float | None, most: float | None) -> Rule:
    """Drops samples with a score out of bounds; NaN, a score nobody could tell, is in them."""

    def rule(scores: Scores) -> str | None:
        value = scores[name]
        low = least is not None and value < least
        return name if low or (most is not None and value > most) else None

    return rule


def first_reason(rules: Sequence[Rule], scores: Scores) -> str | None:
    """The reason of the first rule that objects."""
    return next((reason for rule in rules if (reason := rule(scores))), None)


def told(reason: str, scores: Scores, rules: SelectionRules) -> str:
    """The value that a rule objected to, and its bound: "shorter side 10 < 16"; "" where the reason
    is none of a rule that looks at one sample alone.
    """
    characters = len(scores["caption"])
    if reason == "too_small":
        side = min(scores["original_width"], scores["original_height"])
        return f"shorter side {side} < {rules.min_side}"
    if reason == "aspect":
        return f"aspect ratio {scores['aspect']:.6g} > {rules.max_aspect:g}"
    if reason == "caption_short":
        return f"caption of {characters} characters < {rules.min_caption}"
    if reason == "caption_long":
        return f"caption of {characters} characters > {rules.max_caption}"
    if reason == "language":
        found = language_of(scores["caption"], *rules.languages)
        return f"caption in {found}, wanted {' or '.join(rules.languages)}"
    if reason not in rules.scores:
        return ""
    (least, most), value = rules.scores[reason], float(scores[reason])
    low = least is not None and value < least
    return f"{reason} {value:.6g} {'<' if low else '>'} {least if low else most}"


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
    if all(unicodedata.category(char) in _UNSEEN for char in text):
        text = ""  # directions and joiners without anything to direct or join
    return text, tuple(sorted(set(flags)))


_UNSEEN = ("Cf", "Zs")
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
