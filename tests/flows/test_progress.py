"""What shows progress never ends the work."""

from __future__ import annotations

import logging
import socket

import pytest

from flows import progress


@pytest.mark.filterwarnings("ignore:Artifact creation outside:FutureWarning")
def test_a_server_that_is_away_is_told_of_once_and_ends_nothing(monkeypatch, caplog):
    from prefect import artifacts
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{it.getsockname()[1]}/api"
    monkeypatch.setattr(progress, "_in_prefect", lambda: True)
    tries = []
    create = artifacts.create_progress_artifact
    monkeypatch.setattr(
        artifacts,
        "create_progress_artifact",
        lambda *args, **options: tries.append(args) or create(*args, **options),
    )
    settings = {PREFECT_API_URL: nobody, PREFECT_CLIENT_MAX_RETRIES: 0}
    with (
        temporary_settings(settings),
        caplog.at_level(logging.WARNING),
        progress.meter("read") as it,
    ):
        for done in range(3):
            it(done, 2)
        assert len(tries) == 1
        monkeypatch.setattr(it, "_quiet_until", 0.0)
        it(2, 2)
    assert len(tries) == 2
    said = [record.getMessage() for record in caplog.records if record.name == progress.__name__]
    assert len(said) == 2
    assert "the work goes on" in said[0]
    assert "ConnectError" in said[0]
