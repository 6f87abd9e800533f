"""How the tokens of a shard's captions lie in its file.

As they are, `tokens` [n, width]; or, where an encoder gives each token what depends on its word
alone beside what it says in its caption, with each different word once: `words` [m, k],
`word_rows` [n] int32, `states` [n, width - k]. What is read is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .schema import Field, check

TOKENS, WORDS, WORD_ROWS, STATES = "tokens", "words", "word_rows", "states"

Arrays = Mapping[str, np.ndarray]


def laid_out(tokens: np.ndarray, repeats: int) -> dict[str, np.ndarray]:
    """The arrays for tokens [n, width] whose first `repeats` columns depend on the word alone; the
    words in the order in which they come."""
    if not repeats:
        return {TOKENS: tokens}
    numbers: dict[bytes, int] = {}
    rows = [
        numbers.setdefault(row.tobytes(), len(numbers))
        for row in np.ascontiguousarray(tokens[:, :repeats])
    ]
    words = np.frombuffer(b"".join(numbers), tokens.dtype).reshape(len(numbers), repeats)
    return {WORDS: words, WORD_ROWS: np.array(rows, np.int32), STATES: tokens[:, repeats:]}


def repeated(arrays: Arrays) -> int:
    """The columns of which each different one is stored once."""
    return arrays[WORDS].shape[1] if WORDS in arrays else 0


def count(arrays: Arrays) -> int:
    """Tokens of all captions."""
    return len(arrays[STATES if WORDS in arrays else TOKENS])


def empty(arrays: Arrays, count: int) -> np.ndarray:
    """Room for so many of them, [count, width]."""
    parts = [arrays[name] for name in (WORDS, STATES, TOKENS) if name in arrays]
    return np.empty((count, sum(it.shape[1] for it in parts)), parts[0].dtype)


def copy(arrays: Arrays, first: int, last: int, into: np.ndarray) -> None:
    """Tokens `first` to `last` into an array [last - first, width]."""
    if WORDS in arrays:
        words = arrays[WORDS]
        into[:, : words.shape[1]] = words[arrays[WORD_ROWS][first:last]]
        into[:, words.shape[1] :] = arrays[STATES][first:last]
    else:
        into[:] = arrays[TOKENS][first:last]


def check_tokens(where: str, arrays: Arrays, wanted: Field) -> None:
    """ValueError unless the arrays give tokens of that kind."""
    if WORDS not in arrays:
        check(where, arrays, {TOKENS: wanted})
        return
    check(where, arrays, {WORD_ROWS: Field("int32", ())})
    words, rows, states = arrays[WORDS], arrays[WORD_ROWS], arrays.get(STATES)
    if (
        states is None
        or words.ndim != 2
        or states.ndim != 2
        or words.dtype != states.dtype
        or len(rows) != len(states)
        or not wanted.fits(np.empty((0, words.shape[1] + states.shape[1]), words.dtype))
        or (len(rows) and not 0 <= rows.min() <= rows.max() < len(words))
    ):
        raise ValueError(
            f"{where}: its words, states and word_rows do not make tokens {wanted}; delete it and "
            "encode again"
        )
