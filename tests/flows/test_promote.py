"""Against whom a candidate is held, and on what."""

import pytest

from flows.promote_model import _reads_alike

MADE_OF = {"autoencoder": "autoencoder-1", "clip": "clip-1", "t5": "t5-1", "base": "base-1"}


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({"base": "base-2"}, True),
        ({"sr1": "sr1-1"}, True),
        ({"clip": "clip-2"}, False),
        ({"autoencoder": "autoencoder-2"}, False),
        ({"t5": None}, False),  # nobody listens to it any more
        ({"base": None}, False),  # the autoencoder draws alone
    ],
)
def test_a_champion_is_asked_about_held_out_encodings_that_it_can_read(change, alike):
    changed = {name: it for name, it in (MADE_OF | change).items() if it}
    assert _reads_alike(MADE_OF, changed) == alike
    assert _reads_alike(changed, MADE_OF) == alike
