"""The command line answers like a tool: one JSON line on stdout, and exit codes that mean
something.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.ingest import IngestRules, ingest


def darkroom(home, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DARKROOM_HOME": str(home)}
    command = [sys.executable, "-m", "flows", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)


def test_json_is_the_last_line_of_stdout(tmp_path):
    done = darkroom(tmp_path, "recipes", "--json")
    assert done.returncode == 0, done.stderr
    assert {"shapes", "pictures"} <= json.loads(done.stdout.splitlines()[-1])["recipes"].keys()


def test_status_of_an_empty_home(tmp_path):
    done = darkroom(tmp_path, "status", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"] == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "shapes", "sede=1"], "did you mean 'seed'"),
        (["run", "nothing"], "no recipe 'nothing'"),
        (["train", "shapes", "bass"], "did you mean 'base'"),
        (["frobnicate"], "invalid choice"),
        (["rollback", "shapes"], "was ever promoted"),
        (["posthoc", "shapes", "base", "--out", "x"], "--sigma-rel"),
        (["compare", "shapes"], "two models or more"),
        (["edit", "shapes", "--out", "x"], "required: --pictures"),
        (["edit", "shapes", "--pictures", "x/a.png", "--out", "x"], "--out x: the picture lies"),
        (["compare", "shapes", "shapes?steps="], "expected MODEL?key=value"),
        (["ingest", "shapes://?scenes=4", "--dataset", "memory://x"], "memory://x: each worker"),
        (["ingest", "memory://in", "--dataset", "x"], "memory://in: each worker has a"),
        (["run", "shapes", "data.dataset=memory://x"], "memory://x: each worker"),
    ],
)
def test_bad_usage_is_exit_code_2_and_says_why(tmp_path, words, told):
    done = darkroom(tmp_path, *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stdout == ""


def test_an_input_of_no_data_set_cannot_be_explained(tmp_path):
    done = darkroom(tmp_path, "explain", "nothing", "a.png")
    assert done.returncode == 1
    assert "no data set there" in done.stderr


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_what_an_input_says_is_no_order_to_the_terminal(tmp_path, json_too):
    """The error quotes the header of a table: escape sequences in it are seen, not obeyed."""
    (tmp_path / "t.csv").write_text("\x1b[31m\x1b]0;owned\x07,\x9b2J\na.png,x\n")
    words = ["ingest", str(tmp_path / "t.csv"), "--dataset", str(tmp_path / "set"), *json_too]
    done = darkroom(tmp_path, *words)
    assert done.returncode == 1
    assert "found columns \u241b[31m\u241b]0;owned\u2407, \ufffd2J" in done.stderr
    assert not {"\x1b", "\x07", "\x9b"} & {*done.stderr, *done.stdout}


def test_what_an_explained_row_says_is_no_order_either(tmp_path):
    """Its name is foreign, and so is what was seen of it."""
    folder, name = tmp_path / "in", "a\x1b[31m\x1b]0;owned\x07\n  kept, since version 1\x9b2J.png"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / name)
    Image.new("RGB", (32, 32)).save(folder / "b.png")
    for it in (name, "b.png"):
        (folder / it).with_suffix(".txt").write_text("\x1b[31mred\x9b2J")
    ingest([str(folder)], str(tmp_path / "set"), IngestRules(heldout_share=0))
    done = darkroom(tmp_path, "explain", str(tmp_path / "set"), "owned")
    assert done.returncode == 0, done.stderr
    assert not {"\x1b", "\x07", "\x9b"} & {*done.stderr, *done.stdout}
    first, second, *_ = done.stdout.splitlines()
    assert first.endswith("\u241b[31m\u241b]0;owned\u2407\u240a  kept, since version 1\ufffd2J.png")
    assert second == "  filtered: too_small, since version 1"
    assert "  detail  shorter side 8 < 16" in done.stdout.splitlines()


def test_a_version_is_made_again_elsewhere(tmp_path):
    source = "shapes://?scenes=12&side=16"
    made = ingest([source], str(tmp_path / "datasets" / "scenes")).manifest
    done = darkroom(tmp_path, "reproduce", "scenes", "--into", "again", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["digest"], told["version"]) == (made.digest, 1)
    done = darkroom(tmp_path, "reproduce", "scenes", "--into", "scenes")
    assert done.returncode == 1
    assert "there is a data set" in done.stderr


def test_show_writes_a_page_about_a_data_set(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(3):
        Image.new("RGB", (30, 30), (80 * n, 0, 0)).save(photos / f"{n}.png")
        (photos / f"{n}.txt").write_text(f"a red square, shade {n}")
    made = ingest([str(photos)], str(tmp_path / "datasets" / "reds"))
    page = tmp_path / "page.html"
    done = darkroom(tmp_path, "show", "reds", "--out", str(page), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["version"], told["counts"]["kept"], told["page"]) == (1, 3, str(page))
    assert told["digest"] == made.manifest.digest
    assert made.manifest.digest in page.read_text()
    for words in (["reds", "--version", "2"], ["blues"]):
        done = darkroom(tmp_path, "show", *words, "--out", str(tmp_path / "none.html"))
        assert done.returncode == 1
        assert "no version 2 (published: 1)" in done.stderr or "no data set there" in done.stderr
        assert not (tmp_path / "none.html").exists()


def test_overrides_may_stand_behind_options_and_instead_of_a_recipe(tmp_path):
    for words in (["run", "--json", "sede=1"], ["run", "shapes", "--json", "sede=1"]):
        done = darkroom(tmp_path, *words)
        assert done.returncode == 2
        assert "did you mean 'seed'" in json.loads(done.stdout)["error"]


@pytest.mark.slow
def test_an_average_of_another_length_is_made_afterwards(tmp_path):
    """Of a stage that was really trained by the command line."""
    from training import results, stages

    network = {"width": 32, "layers": 1, "heads": 2, "feedforward": 64, "max_bytes": 96}
    training = {
        "images": 640,
        "batch": 16,
        "ema_sigma_rel": [0.05, 0.1],
        "ema_snapshot_images": 80,
        "preview_images": 160,
    }
    words = ["shapes", "t5", "data.scenes=64", f"t5.config={json.dumps(network)}"]
    words += [f"t5.training={json.dumps(training)}", 'executor={"kind": "local"}']
    early = darkroom(tmp_path, "posthoc", *words, "--sigma-rel", "0.07", "--out", "x")
    assert early.returncode == 2 and "has no version yet" in early.stderr
    done = darkroom(tmp_path, "train", *words, "--json")
    assert done.returncode == 0, done.stderr
    where = json.loads(done.stdout.splitlines()[-1])["directory"]
    out = str(tmp_path / "longer")
    made = darkroom(tmp_path, "posthoc", *words, "--sigma-rel", "0.07", "--out", out, "--json")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout.splitlines()[-1])
    assert (told["images_seen"], told["snapshots"], told["directory"]) == (640, 8, out)
    assert told["profile_error"] < 0.02
    assert stages.load(out).kind == results.committed(where)["kind"] == "t5"
    words += ["--images", "99"]
    wrong = darkroom(tmp_path, "posthoc", *words, "--sigma-rel", "0.07", "--out", out)
    assert wrong.returncode == 2 and "no snapshot of averages at 99 images" in wrong.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_measured_and_drawn_in_training_arrives_in_mlflow(tmp_path):
    """Held-out losses by noise level, pictures and the early stop, of a base that learns nothing,
    so that it ends when its patience does."""
    from mlflow import MlflowClient

    from training import results, validation
    from training.tracking import FINGERPRINT

    training = {
        "images": 3200,
        "batch": 16,
        "learning_rate": 1e-12,
        "log_images": 32,
        "preview_images": 64,
        "heldout_pictures": 64,
        "heldout_images": 80,
        "patience_images": 160,
        "patience_margin": 0.001,
    }
    clip = {
        "embed": 24,
        "image": {"kind": "vit", "side": 16, "patch": 4, "width": 32, "layers": 1},
        "text": {"vocabulary": 1024, "context": 40, "width": 32, "layers": 1, "heads": 2},
    }
    network = {"kind": "unet", "in_channels": 3, "channels": 16, "channel_mult": [1]}
    network |= {"attention": [1], "head_width": 16, "context_width": 32, "blocks": 1}
    words = ["shapes-ddpm", "base", "data.scenes=400", 'executor={"kind": "local"}']
    words += [f"clip.config={json.dumps(clip)}", "clip.training.images=128"]
    words += [f"base.training={json.dumps(training)}", f"base.config.network={json.dumps(network)}"]
    words += ['base.config.listens=["clip"]', 'base.config.preview={"steps": 2}']
    done = darkroom(tmp_path, "train", *words, "--json", seconds=800)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^base: started in .*first update", done.stderr, re.MULTILINE)) == 1
    where = json.loads(done.stdout.splitlines()[-1])["directory"]
    stage, told = results.committed(where), results.history(where)
    assert stage is not None

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    if client.get_experiment_by_name("shapes-ddpm") is None:  # a minute was not enough: it waits
        again = darkroom(tmp_path, "train", *words, seconds=300)
        assert again.returncode == 0, again.stderr
        assert "has not all yet" not in again.stderr, again.stderr
    experiment = client.get_experiment_by_name("shapes-ddpm")
    assert experiment is not None
    (run,) = client.search_runs(
        [experiment.experiment_id], f"tags.`{FINGERPRINT}` = '{stage['fingerprint']}'"
    )

    def series(name: str) -> dict[int, float]:
        return {it.step: it.value for it in client.get_metric_history(run.info.run_id, name)}

    losses = series("heldout_loss")
    assert list(losses) == [80, 160, 240]
    assert max(losses.values()) <= 1.001 * min(losses.values())
    bands = [name for name in run.data.metrics if name.startswith(validation.BY_TIME)]
    assert len(bands) > 2
    for name in ("heldout_loss", "loss", "grad_norm", "data_wait_share", *bands):
        assert series(name) == {it["images_seen"]: it[name] for it in told if name in it}, name
    assert {frozenset(series(name)) for name in bands} == {frozenset(losses)}

    folder = Path(client.download_artifacts(run.info.run_id, ""))
    kept = json.loads((folder / "stage.json").read_text())
    assert kept["stopped_early"] and kept["images_seen"] == 240
    drawn = sorted(Path(where, results.PREVIEWS).iterdir())
    assert [int(path.stem) for path in drawn] == [64, 128, 192, 240]
    arrived = {
        int(re.findall(r"step\W(\d+)", path.name)[0]): path
        for path in (folder / "images").iterdir()
        if path.suffix == ".png"
    }
    assert sorted(arrived) == [64, 128, 192, 240]
    for path in drawn:
        with Image.open(path) as one, Image.open(arrived[int(path.stem)]) as other:
            assert one.size > (16, 16)
            assert one.convert("RGB").tobytes() == other.convert("RGB").tobytes()
