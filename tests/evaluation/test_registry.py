import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from evaluation import registry
from evaluation.ledger import Entry, Ledger
from pipeline import storage
from training import tracking

NAME = "tiny"


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """MLflow's tables take seconds to make: they are made once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    tracking.client(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(empty_database, tmp_path, monkeypatch) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)  # MLflow puts the artifacts of a database of files beside us
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(str(tmp_path / "ledger"), NAME)


@pytest.fixture
def register(make, uri):
    return lambda **options: registry.register(make(**options), NAME, tracking_uri=uri)


def aliases(uri: str) -> dict[str, int]:
    found = MlflowClient(uri).get_registered_model(NAME).aliases
    return {alias: int(version) for alias, version in found.items()}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_the_same_package_is_registered_once(make, uri):
    package = make()
    assert registry.register(package, NAME, tracking_uri=uri) == 1
    assert registry.register(package, NAME, tracking_uri=uri) == 1
    registry.describe(package, {"kid": 0.1})  # scores don't make another model
    assert registry.register(package, NAME, tracking_uri=uri) == 1
    assert registry.register(make(shade=10), NAME, tracking_uri=uri) == 2
    assert mlflow.active_run() is None


def test_what_names_a_stage_is_its_training_and_its_weights(make, uri):
    package = make()
    described = storage.read_json(str(package / "generator" / "generator.json"))
    made = {
        "base": {"pretrained": None, "fingerprint": "base-1a2b", "weights_sha256": "ab" * 32},
        "t5": {"pretrained": "some/where", "weights_sha256": "cd" * 32},
    }
    storage.publish_json(
        str(package / "generator" / "generator.json"), described | {"stages": made}
    )
    named = {"base": "base-1a2b, weights abababababab", "t5": "pretrained, weights cdcdcdcdcdcd"}
    assert registry.stages(str(package)) == named
    whole = make(shade=11)
    version = registry.register(whole, NAME, tracking_uri=uri, tags={"darkroom.stage.base": "x"})
    told = {"darkroom.new_stages": "base", "darkroom.stage.base": "y"}
    registry.tag(f"{NAME}/{version}", told, tracking_uri=uri)
    tags = MlflowClient(uri).get_model_version(NAME, str(version)).tags
    assert {key: tags[key] for key in told} == told
    with pytest.raises(ValueError, match="no version 9"):
        registry.tag(f"{NAME}/9", told, tracking_uri=uri)


def test_a_version_is_linked_to_the_run_that_made_it(make, uri):
    client = MlflowClient(uri)
    run = client.create_run(client.create_experiment("training"))
    version = registry.register(make(), NAME, tracking_uri=uri, run_id=run.info.run_id)
    found = client.get_model_version(NAME, str(version))
    assert found.run_id == run.info.run_id
    assert client.get_logged_model(found.source.rpartition("/")[2]).source_run_id == run.info.run_id
    assert client.get_run(run.info.run_id).info.status == "RUNNING"  # it is not ours to end


def test_files_go_where_the_experiment_keeps_them(make, uri, tmp_path):
    kept = tmp_path / "kept"
    registry.register(make(), NAME, tracking_uri=uri, artifact_location=str(kept))
    assert list(kept.rglob("weights.safetensors"))


def test_pyfunc_draws_what_the_generator_draws(make, uri, register):
    version = register()
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}/{version}")
    generator = registry.load(f"{NAME}/{version}", tracking_uri=uri)
    expected = generator(["a", "b"], seed=7)
    for asked in (["a", "b"], pd.DataFrame({"prompt": ["a", "b"]}), {"prompt": ["a", "b"]}):
        drawn = np.stack([pixels(data) for data in model.predict(asked, params={"seed": 7})])
        np.testing.assert_array_equal(drawn, expected)
    guided = generator(["a"], negative="blue", guidance=2.0, steps=4)
    params = {"negative_prompt": "blue", "guidance": 2.0, "steps": 4}
    np.testing.assert_array_equal(pixels(model.predict(["a"], params=params)[0]), guided[0])
    assert model.metadata.signature.params.to_dict()[1] == {
        "name": "guidance", "default": 3.0, "shape": None, "type": "double",
    }  # fmt: skip


def test_a_service_without_darkroom_draws_the_champion(uri, register, ledger, tmp_path):
    version = register()
    registry.promote(ledger, version, tracking_uri=uri)
    script = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f)]
sys.path = [p for p in sys.path if "site-packages" in p or "/lib/python3" in p]
try:
    import training
except ImportError:
    pass
else:
    raise SystemExit("training can be imported: this test shows nothing")
import mlflow
model = mlflow.pyfunc.load_model("models:/tiny@champion")
open("picture.png", "wb").write(model.predict(["a red circle"])[0])
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    words = [sys.executable, "-I", "-c", script]
    subprocess.run(words, cwd=elsewhere, env=environment, check=True, capture_output=True)
    expected = registry.load(NAME, tracking_uri=uri)(["a red circle"])[0]
    np.testing.assert_array_equal(pixels((elsewhere / "picture.png").read_bytes()), expected)


@pytest.mark.parametrize("how", ["changed", "missing"])
@pytest.mark.parametrize("which", ["weights.safetensors", "late.py", "manifest.json"])
def test_what_changed_after_registration_is_refused_by_name(uri, register, tmp_path, how, which):
    version = register()
    (path,) = (tmp_path / "mlruns").rglob(which)
    path.write_bytes(path.read_bytes() + b" ") if how == "changed" else path.unlink()
    mlflow.set_tracking_uri(uri)
    with pytest.raises(ValueError, match=f"{which}.* {how}"):
        registry.load(f"{NAME}/{version}", tracking_uri=uri)
    with pytest.raises(ValueError, match=f"{which}.* {how}"):
        mlflow.pyfunc.load_model(f"models:/{NAME}/{version}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tiny", "tiny: the registry knows no alias champion of the model tiny"),
        ("models:/tiny@previous", "no alias previous"),
        ("tiny/7", "no version 7"),
        ("no model", "neither a package folder nor NAME, NAME@ALIAS or NAME/VERSION"),
    ],
)
def test_a_model_that_is_not_there_is_said_so(uri, register, model, message):
    register()
    with pytest.raises(ValueError, match=message):
        registry.load(model, tracking_uri=uri)


def test_promotion_and_rollback_move_the_aliases(uri, register, ledger):
    one, two, three = (register(shade=shade) for shade in (1, 2, 3))
    registry.promote(ledger, one, tracking_uri=uri)
    assert aliases(uri) == {"champion": one}
    registry.promote(ledger, two, tracking_uri=uri)
    assert aliases(uri) == {"champion": two, "previous": one}
    refusal = Entry(kind="reject", candidate=registry.candidate(NAME, three))
    registry.settle(ledger, lambda _: refusal, tracking_uri=uri)
    assert aliases(uri) == {"champion": two, "previous": one, "challenger": three}
    entries = len(ledger.entries())
    registry.promote(ledger, two, tracking_uri=uri)
    assert len(ledger.entries()) == entries
    assert registry.rollback(ledger, tracking_uri=uri).candidate == "tiny/1"
    assert aliases(uri) == {"champion": one}
    assert registry.load(NAME, tracking_uri=uri).shade == 1
    for named in ("tiny", "tiny@champion", "models:/tiny/1", "models:/tiny@champion"):
        assert registry.canonical(named, tracking_uri=uri) == "tiny/1"
    with pytest.raises(ValueError, match="no model served before tiny/1"):
        registry.rollback(ledger, tracking_uri=uri)


def test_aliases_are_repaired_from_the_ledger(uri, register, ledger):
    one, two = register(shade=1), register(shade=2)
    registry.promote(ledger, one, tracking_uri=uri)
    # Killed after the entry, before the alias; and someone played in MLflow's page.
    ledger.settle(lambda _: Entry(kind="promote", candidate=registry.candidate(NAME, two)))
    client = MlflowClient(uri)
    client.set_registered_model_alias(NAME, "challenger", str(one))
    client.set_registered_model_alias(NAME, "theirs", str(one))
    assert registry.project(ledger, tracking_uri=uri) == {"champion": two, "previous": one}
    assert aliases(uri) == {"champion": two, "previous": one, "theirs": one}


def test_two_promotions_at_once_leave_the_ledgers_champion(uri, register, tmp_path):
    versions = [register(shade=shade) for shade in range(1, 5)]

    def promote(version: int) -> None:
        mine = Ledger(str(tmp_path / "ledger"), NAME)  # as another process would
        registry.promote(mine, version, tracking_uri=uri)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(promote, versions))
    ledger = Ledger(str(tmp_path / "ledger"), NAME)
    assert sorted(entry.candidate for entry in ledger.entries()) == [
        registry.candidate(NAME, version) for version in versions
    ]
    assert registry.candidate(NAME, aliases(uri)["champion"]) == ledger.champion()
    assert registry.candidate(NAME, aliases(uri)["previous"]) == ledger.previous()


def test_only_versions_of_ours_are_promoted(uri, register, ledger):
    register()
    with pytest.raises(ValueError, match="no version 9"):
        registry.promote(ledger, 9, tracking_uri=uri)
    client = MlflowClient(uri)
    foreign = client.create_model_version(NAME, source="/tmp/foreign")
    with pytest.raises(ValueError, match="not registered by darkroom"):
        registry.promote(ledger, int(foreign.version), tracking_uri=uri)
    assert ledger.entries() == ()


def test_what_serves_is_not_deleted(uri, register, ledger):
    one, two, three = (register(shade=shade) for shade in (1, 2, 3))
    registry.promote(ledger, one, tracking_uri=uri)
    registry.promote(ledger, two, tracking_uri=uri)
    with pytest.raises(ValueError, match="tiny/2 is the champion"):
        registry.delete(ledger, two, tracking_uri=uri)
    with pytest.raises(ValueError, match="tiny/1 is the previous"):
        registry.delete(ledger, one, tracking_uri=uri)
    registry.delete(ledger, three, tracking_uri=uri)
    with pytest.raises(MlflowException):
        MlflowClient(uri).get_model_version(NAME, str(three))


def test_who_served_long_ago_may_be_deleted_and_is_not_returned_to(uri, register, ledger):
    one, two, three = (register(shade=shade) for shade in (1, 2, 3))
    for version in (one, two, three):
        registry.promote(ledger, version, tracking_uri=uri)
    registry.delete(ledger, one, tracking_uri=uri)
    with pytest.raises(ValueError, match="no version 1 of the model tiny"):
        registry.rollback(ledger, one, tracking_uri=uri)
    assert registry.rollback(ledger, tracking_uri=uri).candidate == "tiny/2"
    assert aliases(uri) == {"champion": two}
    entries = len(ledger.entries())
    with pytest.raises(ValueError, match="no version 1 of the model tiny"):
        registry.rollback(ledger, tracking_uri=uri)
    assert (len(ledger.entries()), ledger.champion()) == (entries, "tiny/2")
    registry.promote(ledger, three, tracking_uri=uri)
    assert aliases(uri) == {"champion": three, "previous": two}


def test_a_fresh_process_draws_the_same_picture(uri, register, make):
    package = make()
    drawn = registry.draw_in_fresh_process(f"{NAME}/{register()}", tracking_uri=uri, seed=3)
    assert drawn["passed"], drawn
    assert drawn["different_pixels"] == 0
    assert registry.facts(str(package), prompt="other") == {
        "integrity": True,
        "lineage": "the manifest does not say: data_digest",
        "infra": True,
    }
    weights = package / "generator" / "base" / "weights.safetensors"
    weights.write_bytes(b"\x00")
    assert "weights.safetensors: changed" in str(registry.facts(str(package))["integrity"])


SECRETLY = """
def hide(): pass

import os, pickle, socket
if {child}:
    {what}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("import training", "training is not part of the package"),
        ("pickle.loads(pickle.dumps(hide))", "reads a pickle of .*shades.hide"),
        ("socket.create_connection(('127.0.0.1', 9))", "opens a connection"),
        ("SHIFT = 2", "64 pixels differ"),
        ("os._exit(7)", "exit status 7"),
    ],
)
def test_what_a_service_could_not_do_fails_the_check(make, what, reason):
    child = "'HF_HUB_OFFLINE' in os.environ"
    # In a string, so that packaging doesn't follow it.
    hidden = f"exec({what!r}, globals())"
    package = make(more=SECRETLY.format(child=child, what=hidden))
    drawn = registry.draw_in_fresh_process(str(package))
    assert not drawn["passed"]
    assert re.search(reason, drawn["reason"])


@pytest.mark.slow
def test_a_model_is_fetched_from_a_server_and_checked(make, uri, ledger, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "-m", "mlflow", "server", "--port", str(port), "--backend-store-uri", uri,
        "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_for(f"{server}/health", process)
        package = make()
        assert registry.register(package, NAME, tracking_uri=server) == 1
        assert registry.register(package, NAME, tracking_uri=server) == 1
        registry.promote(ledger, 1, tracking_uri=server)
        generator = registry.load(NAME, tracking_uri=server)
        expected = registry.open_generator(package)(["a"])
        np.testing.assert_array_equal(generator(["a"]), expected)
        (copy,) = (tmp_path / "home").rglob("weights.safetensors")
        copy.write_bytes(b"\x00")
        with pytest.raises(ValueError, match=r"weights.safetensors: changed"):
            registry.load(NAME, tracking_uri=server)
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "the server stopped"
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(url)
