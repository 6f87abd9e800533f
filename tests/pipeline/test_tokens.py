"""What repeats with its word is stored once, and read as if it had not been."""

import numpy as np
import pytest

from pipeline import tokens


@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_tokens_come_back_bit_for_bit(repeats):
    """Zeros of both signs are different words, and so are NaNs."""
    given = np.random.default_rng(0).integers(0, 3, (40, 3)).astype(np.float16)
    given[3, 0], given[4, 0], given[5] = -0.0, np.nan, np.inf
    stored = tokens.laid_out(given, repeats)
    assert (tokens.repeated(stored), tokens.count(stored)) == (repeats, 40)
    back = tokens.empty(stored, 40)
    for first, last in ((0, 7), (7, 7), (7, 40)):
        tokens.copy(stored, first, last, back[first:last])
    assert back.dtype == given.dtype and back.tobytes() == given.tobytes()
    if repeats:
        assert len(stored["words"]) == len({row[:repeats].tobytes() for row in given})
