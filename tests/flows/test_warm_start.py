"""A stage may begin with the weights of another recipe's: named, and checked early."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from evaluation.ledger import Entry, Ledger
from flows import commands, data_commands, train_stage
from flows.line import Line
from flows.recipe import load
from flows.settings import Settings
from flows.train_stage import begun_otherwise, make_job, train
from pipeline import manifest, storage
from pipeline.manifest import Manifest, Shard, fingerprint
from pipeline.schema import EncoderSpec
from training import distributed, results, resuming, tracking
from training.job import Job
from training.resuming import learning


@pytest.fixture
def home(tmp_path) -> Settings:
    return Settings(tmp_path / "home", "sqlite://")


def finished(folder: Path, job: Job | None = None) -> str:
    """A stage's directory, as if the job had been trained there."""
    job = job or Job(kind="base", fingerprint="", config={}, training={}, output=str(folder))
    digest = manifest.read(job.dataset, job.version).digest if job.version else ""
    storage.publish_json(str(folder / results.STAGE), {**job.to_json(), "data_digest": digest})
    return str(folder)


def taken_down(data: Manifest, *keys: str) -> None:
    """The version without these pictures; models know it by the digest that it had."""
    redacted = {"digest": data.digest, "keys": keys}
    stated = replace(data, shards=(), redacted=redacted).stated()
    storage.publish_json(data.url("versions", f"{data.version:06d}.json"), stated)


def grown(data: Manifest, **changes) -> Manifest:
    """The next version, with a shard more."""
    more = replace(data.shards[0], name=f"train-{data.version:06d}")
    after = replace(data, version=data.version + 1, parent=data.version, shards=(more,), **changes)
    manifest.publish(after)
    return after


def line_of(home: Settings, *overrides: str) -> Line:
    return Line(load("shapes", overrides), home)


def promoted(home: Settings, name: str, **stages: str) -> None:
    line = Line(load("shapes", [f"name={name}"]), home)
    number = len(line.ledger.entries()) + 1
    line.note_version(f"{name}/{number}", stages)
    Ledger(home.ledger, name).settle(lambda _: Entry(kind="promote", candidate=f"{name}/{number}"))


def data_of(line: Line) -> Manifest:
    shard = Shard("train-000000", "train", 4, 100, "0" * 64)
    manifest.publish(Manifest(line.dataset, 1, None, (shard,)))
    return line.manifest()


def test_a_directory_a_model_and_a_version_can_be_named(home, tmp_path):
    first, second = (finished(tmp_path / name) for name in ("first", "second"))
    promoted(home, "small", base=first)
    promoted(home, "small", base=second)
    for named, found in {
        first: first,
        "small": second,
        "small/1": first,
        "models:/small/1": first,
        "models:/small@champion": second,
    }.items():
        assert line_of(home, f"base.warm_start={named}").warm_start("base") == found
    assert line_of(home).warm_start("base") is None


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("small", r"base.warm_start: small has no champion here; train that model first"),
        ("small/7", r"base.warm_start: small/7 has no finished base here; .*base.warm_start=null"),
        ("s3://bucket/base", r"s3://bucket/base is on no file system of this machine"),
        ("./nothing", r"base.warm_start: ./nothing holds no finished stage"),
        ("small@previous", r"only the champion can be named by an alias"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_done(home, named, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        line_of(home, f"base.warm_start={named}").warm_start("base")
    monkeypatch.setattr(commands, "settings", lambda: home)
    for command in (commands.run, commands.encode):
        with pytest.raises(commands.UsageError, match=told):
            command("shapes", [f"base.warm_start={named}"])


def test_the_first_weights_are_the_champions_own_where_there_is_one(home, tmp_path):
    other, own = finished(tmp_path / "other"), tmp_path / "own"
    words = [f"classifier.warm_start={other}", "classifier.warm_images=640"]
    line = Line(load("shapes-classifier", words), home)
    data = data_of(line)
    asked = line.recipe.stage("classifier").training["images"]
    job = make_job(line, "classifier", data)
    assert (job.parent, job.training["images"]) == (other, asked)

    finished(own, job)
    promoted(home, "shapes-classifier", classifier=str(own))
    job = make_job(Line(line.recipe, home), "classifier", data)
    assert (job.parent, job.training["images"]) == (str(own), 640)


@pytest.fixture
def encoders(monkeypatch) -> dict[str, str]:
    """What the inputs of a base make now, by stage: to be changed where one is trained anew."""
    made = {name: f"{name}-1" for name in ("autoencoder", "clip", "t5")}

    def encodings(line, name, data):
        inputs = made if name == "base" else {"pixels": "pixels-1"}
        return [EncoderSpec(it, "text", fingerprint) for it, fingerprint in inputs.items()]

    monkeypatch.setattr(train_stage, "encodings", encodings)
    return made


def champion(home: Settings) -> tuple[Line, Manifest, str]:
    """(the line of a champion, the data that it learnt from, its base)."""
    line = line_of(home)
    data = data_of(line)
    job = make_job(line, "base", data)
    base = finished(Path(job.output), job)
    promoted(home, "shapes", base=base)
    return line_of(home), data, base


@pytest.mark.parametrize("anew", [None, "autoencoder", "clip", "t5"])
def test_no_base_begins_with_weights_that_have_learnt_to_read_other_encoders(home, encoders, anew):
    """One that --fresh trained anew keeps the identity that the first version of the data gives."""
    line, data, base = champion(home)
    lineage = line.stage_lineage("base", data)
    data = grown(data)
    assert line.stage_lineage("base", data) == lineage
    if anew:
        encoders[anew] = f"{anew}-2"
    job = make_job(line, "base", data)
    assert job.parent == (None if anew else base)
    stage = line.recipe.stage("base")
    assert job.training["images"] == (stage.training["images"] if anew else stage.warm_images)


def test_an_edit_begins_with_its_base_which_may_be_another_by_now(home, encoders):
    """It learns from no encoding that would tell."""
    line = Line(load("shapes-diffusionclip"), home)
    data = data_of(line)
    job = make_job(line, "edit", data)
    promoted(home, line.recipe.name, edit=finished(Path(job.output), job))
    again = Line(load("shapes-diffusionclip", ["edit.training.batch=8"]), home)
    assert again.stage_lineage("edit", data) == line.stage_lineage("edit", data)
    assert make_job(again, "edit", data).parent is None


def test_no_weights_go_on_that_have_learnt_what_was_taken_down(home, encoders):
    """Neither those of a base that saw it, nor of one that began with such a base's."""
    line, first, base = champion(home)
    data = grown(first)
    job = make_job(line, "base", data)
    second = finished(Path(job.output), job)
    promoted(home, "shapes", base=second)
    data = grown(data)
    line = line_of(home)
    assert (job.parent, make_job(line, "base", data).parent) == (base, second)
    named = line_of(home, "name=other", "data.dataset=shapes", f"base.warm_start={second}")
    assert make_job(named, "base", data).parent == second

    taken_down(first, "0" * 32)
    assert make_job(line, "base", data).parent is None
    assert data_commands._learnt_from(home, {first.digest}) == {
        "shapes/1": ["base"],
        "shapes/2": ["base"],
    }
    told = "has learnt from pictures of .*/shapes version 1 that were taken down.*warm_start=null"
    with pytest.raises(ValueError, match=told):
        make_job(named, "base", data)


def test_other_warm_images_than_it_was_begun_with_are_not_ignored_in_silence(
    home, encoders, monkeypatch, capsys
):
    """Of a base that is begun, and of one that is finished."""
    line, data, _ = champion(home)
    data = grown(data)
    monkeypatch.setattr(distributed, "fit", MagicMock(side_effect=RuntimeError("enough")))
    monkeypatch.setattr(tracking.Run, "start", lambda *_, **__: MagicMock())

    def said(*words: str) -> str:
        with contextlib.suppress(RuntimeError):
            train(line_of(home, *words), "base", data)
        return capsys.readouterr().err

    assert said() == "", "it begins"
    job = make_job(line, "base", data)
    had, full = job.training["images"], line.recipe.stage("base").training["images"]
    storage.publish_json(str(Path(job.output, results.JOB)), job.to_json())
    for _ in ("begun", "finished"):
        assert said() == ""
        for words, asked in (("base.warm_images=640", 640), ("base.warm_images=null", full)):
            told = said(words)
            assert f"base.warm_images: begun with {had}, asked {asked}: it stays" in told
            assert "`--fresh` trains it anew" in told
        finished(Path(job.output), job)


def test_warm_images_are_nothing_to_who_began_with_no_champion(home, tmp_path):
    other = finished(tmp_path / "other")
    for words in ([], [f"classifier.warm_start={other}"]):
        line = Line(load("shapes-classifier", words), home)
        data = manifest.latest(line.dataset) or data_of(line)
        begun = make_job(line, "classifier", data).to_json()
        line = Line(load("shapes-classifier", [*words, "classifier.warm_images=640"]), home)
        assert begun["training"]["images"] != 640
        assert train_stage.warmed_otherwise(line, "classifier", begun) is None


@pytest.mark.parametrize("left", ["nothing", "another home"])
def test_a_home_that_is_moved_as_a_whole_changes_nothing(home, encoders, left):
    """A begun training goes on, the champion's weights are found, and so are its data: whatever
    lies where the home was."""
    line, first, base = champion(home)
    data = grown(first)
    job = make_job(line, "base", data)
    storage.publish_json(str(Path(job.output, results.JOB)), job.to_json())
    for stage in (*job.inputs.values(), base):
        begun = replace(job, parent=None, version=1, output=stage)
        storage.publish_json(str(Path(stage, results.JOB)), begun.to_json())
    assert make_job(line, "base", data) == job

    moved = Settings(home.home.with_name("elsewhere"), "sqlite://")
    home.home.rename(moved.home)
    if left == "another home":
        shutil.copytree(moved.home, home.home)
    line = line_of(moved)
    data = line.manifest()
    again = make_job(line, "base", data)
    before = json.dumps(job.to_json())
    assert again.to_json() == json.loads(before.replace(str(home.home), str(moved.home)))
    assert resuming.differences(job.to_json(), again.to_json()) == []

    second = finished(Path(again.output), again)
    promoted(moved, "shapes", base=str(home.stage(Path(second).name)))
    third = grown(data)
    assert make_job(line_of(moved), "base", third).parent == second
    named = data_commands._learnt_from(moved, {first.digest})
    assert named == {"shapes/1": ["base"], "shapes/2": ["base"]}
    taken_down(manifest.read(line.dataset, 1), "0" * 32)
    assert make_job(line_of(moved), "base", third).parent is None


@pytest.mark.parametrize("patience", [0, 640])
def test_what_changes_no_result_may_change_when_a_training_goes_on(home, patience):
    """With patience, what is held out is part of what decides the result: another training."""
    begun = {"images": 64, "log_images": 32, "patience_images": patience}
    begun |= {"heldout_pictures": 8, "heldout_images": 64}
    asked = begun | {"log_images": 16, "checkpoint_images": 48, "workers": 2}
    first, again, other = (
        line_of(home, f"autoencoder.training={json.dumps(it)}")
        for it in (begun, asked, asked | {"heldout_pictures": 4})
    )
    data = data_of(first)
    job = make_job(first, "autoencoder", data)
    storage.publish_json(str(Path(job.output, results.JOB)), job.to_json())
    resumed = make_job(again, "autoencoder", data)
    assert (resumed.output, resumed.training) == (job.output, asked)
    assert (make_job(other, "autoencoder", data).output == job.output) == (patience == 0)


def test_what_is_trained_anew_says_what_was_begun(home):
    """With which keys other than asked, and where it lies; not of what goes on, is finished, was
    set aside, or is of another network or recipe."""
    training = {"images": 64, "batch": 16}

    def job_of(name: str = "shapes", **changes):
        words = [f"t5.training={json.dumps(training | changes.pop('training', {}))}"]
        words += [f"{key.replace('__', '.')}={json.dumps(it)}" for key, it in changes.items()]
        line = Line(load(name, words), home)
        return line, make_job(line, "t5", manifest.latest(line.dataset) or data_of(line))

    def said(name: str = "shapes", **changes) -> str | None:
        line, job = job_of(name, **changes)
        return begun_otherwise(line, "t5", job)

    _, begun = job_of()
    assert said() is None, "nothing was begun"
    storage.publish_json(str(Path(begun.output, results.JOB)), begun.to_json())
    assert said() is None, "it goes on"
    told = said(training={"batch": 32}, seed=7)
    assert told is not None
    assert told.startswith(
        "t5: seed: begun with 0, asked 7; training.batch: begun with 16, asked 32: trained anew; "
        f"the begun training lies in {begun.output}, and goes on"
    )
    assert said(training={"stall_seconds": 9, "max_skipped": 1, "preview_images": 8}) is None
    assert said("shapes-flow", training={"batch": 32}) is None, "another recipe"
    assert said(t5__config={"width": 32}, training={"batch": 32}) is None, "another network"
    nearer, near = job_of(training={"batch": 32})
    storage.publish_json(str(Path(near.output, results.JOB)), near.to_json())
    assert f"lies in {near.output}," in (said(training={"batch": 32}, seed=7) or "")
    Path(near.output).rename(f"{near.output}.old1")
    assert f"lies in {begun.output}," in (said(training={"batch": 32}, seed=7) or "")
    data = manifest.read(begun.dataset, 1)
    manifest.publish(replace(data, version=2, parent=1))
    assert "version" not in (said(training={"batch": 32}, seed=7) or ""), "the same shards"
    other = replace(data.shards[0], name="train-000001")
    manifest.publish(replace(data, version=3, parent=2, shards=(*data.shards, other)))
    told = said(training={"batch": 32}, seed=7)
    assert told is not None and "version: begun with 1, asked 3" in told
    (Path(begun.output) / results.STAGE).write_text("{}")
    assert begun_otherwise(nearer, "t5", near) is None, "finished"


def test_that_is_said_before_it_is_trained_and_ends_nothing(home, monkeypatch, capsys):
    first, other = (line_of(home, f"t5.training.batch={batch}") for batch in (16, 32))
    data = data_of(first)
    begun = make_job(first, "t5", data)
    storage.publish_json(str(Path(begun.output, results.JOB)), begun.to_json())
    trained = []

    def fit(job, on_progress, **_):
        trained.append((job.training["batch"], capsys.readouterr().err))
        raise RuntimeError("enough")

    monkeypatch.setattr(distributed, "fit", fit)
    monkeypatch.setattr(tracking.Run, "start", lambda *_, **__: MagicMock())
    for line in (other, first):
        with pytest.raises(RuntimeError, match="enough"):
            train(line, "t5", data)
    (batch, said), goes_on = trained
    assert batch == 32
    assert "t5: training.batch: begun with 16, asked 32: trained anew" in said
    assert f"the begun training lies in {begun.output}" in said
    assert goes_on == (16, "")


def test_it_decides_the_result_and_what_says_nothing_does_not(home):
    plain, other = line_of(home), line_of(home, "base.warm_start=small")
    data = data_of(plain)
    assert plain.recipe.identity != other.recipe.identity
    assert plain.stage_identity("base", data) != other.stage_identity("base", data)
    assert plain.stage_lineage("base", data) == other.stage_lineage("base", data)
    body = plain.recipe.model_dump(mode="json", exclude={"schedule", "executor", "parallel"})
    for name in ("prior", "sr1", "sr2", "edit"):
        assert body.pop(name) is None
    for name in plain.recipe.stages:
        assert body[name].pop("warm_start") is None
        assert body[name].pop("sampler") is None
        body[name]["training"] = learning(body[name]["training"])
    assert plain.recipe.identity == fingerprint(body)


def test_without_t5_in_what_the_base_listens_to_there_is_none():
    assert "t5" in load("shapes").stages
    told = load("shapes", ['base.config.listens=["clip"]'])
    assert told.stages == ("autoencoder", "clip", "base")
    assert told.inputs("base") == ("autoencoder", "clip")
    assert load("shapes", ['base.config.listens=["t5"]']).stages == load("shapes").stages


def test_what_is_made_afresh_loses_nothing(home):
    """Neither what was trained nor the scores and the report, however often."""
    line = line_of(home)
    data = data_of(line)
    kept = {line.stage_dir("t5", data) / results.STAGE, line.model_dir(data) / "report.html"}
    for time in ("first", "second"):
        for file in kept:
            storage.publish_bytes(str(file), time.encode())
        commands._forget(line, line.recipe.stages)
        commands.hanging.before.aside.clear()
    for file in kept:
        asides = [file.parent.with_name(f"{file.parent.name}.old{n}") for n in (1, 2)]
        assert [(it / file.name).read_text() for it in asides] == ["first", "second"]
        assert not file.exists()
