"""JSON becomes configs in one place; a stage comes back from its directory alone."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import stages
from training.config import TrainingConfig
from training.stages import reconstruct


@dataclass(frozen=True, kw_only=True)
class Round:
    kind: Literal["round"] = "round"
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Angular:
    kind: Literal["angular"] = "angular"
    corners: tuple[int, ...] = (3, 4)

    def __post_init__(self):
        if 1 in self.corners:
            raise ValueError(f"a shape has no single corner, got {self.corners}")


@dataclass(frozen=True)
class Drawing:
    name: str
    shape: Round | Angular = Round()
    more: tuple[Angular, ...] = ()
    place: tuple[float, float] = (0.0, 0.0)
    note: str | None = None
    filled: bool = True
    weight: float | dict[str, float] = 1.0


FULL = {
    "name": "x",
    "shape": {"kind": "angular", "corners": [5]},
    "more": [{}, {"corners": [6, 7]}],
    "place": [1, 2.5],
    "note": "n",
    "filled": False,
}


def test_nested_json_becomes_dataclasses():
    built = reconstruct(Drawing, FULL)
    more = (Angular(), Angular(corners=(6, 7)))
    assert built == Drawing("x", Angular(corners=(5,)), more, (1.0, 2.5), "n", False)
    assert type(built.place[0]) is float
    assert reconstruct(Drawing, json.loads(json.dumps(asdict(built)))) == built
    assert reconstruct(Drawing, {"name": "y"}) == Drawing("y")
    usual = reconstruct(Drawing, {"name": "z", "shape": {"radius": 2}}).shape
    assert usual == Round(radius=2.0), "without a kind, the first of the union"
    weights = [reconstruct(Drawing, {"name": "w", "weight": it}).weight for it in (2, {"red": 2})]
    assert weights == [2.0, {"red": 2.0}] and type(weights[1]["red"]) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nme": "x"}, r"drawing: no key 'nme'; did you mean 'name'\?"),
        (
            {"shape": {"kind": "angulr"}},
            r"drawing.shape.kind: got 'angulr'; did you mean 'angular'",
        ),
        ({"shape": {"kind": None}}, r"drawing.shape.kind: got None \(known: angular, round\)"),
        ({"shape": {"kind": "round", "corners": [3]}}, r"drawing.shape: no key 'corners'"),
        (
            {"shape": {"kind": "round", "radius": "2"}},
            r"drawing.shape.radius: got '2', wanted float",
        ),
        ({"shape": 3}, r"drawing.shape: got 3, wanted the fields of Round"),
        ({"more": [{}, {"corners": [3, 1]}]}, r"drawing.more\[1\]: a shape has no single corner"),
        ({"more": [{"corners": [3.5]}]}, r"drawing.more\[0\].corners\[0\]: got 3.5, wanted int"),
        ({"more": {}}, r"drawing.more: got \{\}, wanted a list"),
        ({"place": [1]}, r"drawing.place: got 1 values, wanted 2"),
        ({"filled": 1}, r"drawing.filled: got 1, wanted bool"),
        ({"place": [True, 1]}, r"drawing.place\[0\]: got True, wanted float"),
        ({"note": 3}, r"drawing.note: got 3, wanted str"),
        ({"note": {"a": 3}}, r"drawing.note: got \{'a': 3\}, wanted str"),
        ({"weight": {"red": "x"}}, r"drawing.weight.red: got 'x', wanted float"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(Drawing, FULL | change, "drawing")


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="drawing: name is missing"):
        reconstruct(Drawing, {}, "drawing")


@pytest.mark.parametrize("kind", stages.CONFIGS)
def test_every_config_survives_json(kind):
    default = stages.CONFIGS[kind]()
    assert default.kind == kind
    assert stages.config_of(kind, json.loads(json.dumps(asdict(default)))) == default
    assert stages.STAGES[kind].kind == kind


def test_how_a_stage_is_trained_is_checked_alike():
    described = {"images": 10, "optimizer": {"kind": "adamw"}}
    assert stages.training_of(described) == TrainingConfig(images=10)
    with pytest.raises(ValueError, match=r"training: no key 'learning_rte'; did you mean"):
        stages.training_of({"learning_rte": 1.0})
    with pytest.raises(ValueError, match=r"training: learning_rate .*-1"):
        stages.training_of({"learning_rate": -1.0})


def test_an_unknown_kind_of_stage_is_refused():
    with pytest.raises(
        ValueError, match=r"no stage of kind 'autoencodr'; did you mean 'autoencoder'"
    ):
        stages.create("autoencodr", {})


@pytest.mark.parametrize("kind", stages.STAGES)
def test_a_stage_comes_back_frozen_with_its_weights(line, kind):
    stage = stages.load(line.stages[kind])
    stored = load_file(f"{line.stages[kind]}/weights.safetensors")
    state = stage.state_dict()
    assert stored
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert not stage.training
    assert not any(p.requires_grad for p in stage.parameters())


def test_weights_of_another_config_are_refused(line, tmp_path):
    config = json.loads((line.root / "t5" / "config.json").read_text())
    config["config"]["feedforward"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        load_file(f"{line.stages['t5']}/weights.safetensors"), tmp_path / "weights.safetensors"
    )
    with pytest.raises(ValueError, match=r"another network: .*\[64, 32\], wanted \[48, 32\]"):
        stages.load(tmp_path)
