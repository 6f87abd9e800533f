import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from evaluation import serving
from evaluation.packaging import code, describe
from tests.evaluation.conftest import untrained

FILES = {"training/__init__.py", "training/generator.py", "training/late.py"} | {
    "training/networks/__init__.py",
    "pipeline/__init__.py",
    "pipeline/shades.py",
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def served(folder: Path) -> Any:
    model = serving.PackagedGenerator()
    model.load_context(SimpleNamespace(artifacts={"package": str(folder)}, model_config={}))
    return model


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_two_versions_of_the_code_live_in_one_process(make):
    one, two = make(shift=1), make(shift=2)
    a, b = serving.open_generator(one), serving.open_generator(two)
    assert type(a).__module__ != type(b).__module__
    np.testing.assert_array_equal(a(["x"]) + 1, b(["x"]))
    np.testing.assert_array_equal(serving.open_generator(one)(["x"]), a(["x"]))


def test_one_code_with_two_weights_is_one_code(make):
    one, two = make(shade=9), make(shade=10)
    assert one != two
    a, b = serving.open_generator(one), serving.open_generator(two)
    assert type(a) is type(b)
    np.testing.assert_array_equal(a(["x"]) + 1, b(["x"]))


def test_packaging_again_finds_the_same_folder(make, tmp_path):
    first = make()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert make() == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert make(lineage={"dataset": "d", "version": 2}) != first
    assert [
        path.name for path in (tmp_path / "packages").iterdir() if path.name.startswith(".")
    ] == []


def test_a_package_holds_what_the_generator_imports_and_nothing_else(make):
    folder = make()
    name = serving.verify(folder)["code"]
    found = {path.relative_to(folder / name).as_posix() for path in (folder / name).rglob("*.py")}
    assert found == {"__init__.py", *FILES}
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert pins["numpy"] == np.__version__
    assert {"mlflow", "pillow", "pandas"} <= {pin.lower() for pin in pins}


def test_scores_come_later_and_change_no_identity(make):
    folder = make()
    before = serving.verify(folder)
    describe(folder, {"kid": {"value": 0.01, "count": 1000}, "odd": "a|b\nc"})
    after = serving.verify(folder)
    assert after["package"] == before["package"]
    assert after["scorecard"]["kid"]["value"] == 0.01
    assert set(after["files"]) - set(before["files"]) == {"scorecard.json"}
    page = (folder / "README.md").read_text()
    assert "| kid.value | 0.01 |" in page
    assert r"| odd | a\|b c |" in page


@pytest.mark.parametrize(
    "damage", ["generator/base/weights.safetensors", "serving.py", "training/late.py", "README.md"]
)
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_file_is_refused_by_name(make, damage, how):
    folder = make()
    path = folder / damage
    if not path.exists():
        path = next(folder.glob(f"darkroom_*/{damage}"))
    path.write_bytes(path.read_bytes() + b"\n") if how == "changed" else path.unlink()
    with pytest.raises(ValueError, match=f"{path}: .*{how}"):
        served(folder)


def test_a_changed_manifest_is_refused_when_its_hash_is_known(make):
    folder = make()
    with pytest.raises(ValueError, match=r"manifest.json: changed"):
        serving.open_generator(folder, None, "0" * 64)


def test_byte_code_and_strange_files_in_a_package_never_run(make):
    folder = make(shift=7)
    code_folder = next(folder.glob("darkroom_*"))
    (code_folder / "training" / "sneaky.py").write_text("raise RuntimeError\n")
    cache = code_folder / "training" / "__pycache__"
    cache.mkdir()
    (cache / "generator.cpython-311.pyc").write_bytes(b"garbage")
    serving.open_generator(folder)
    with pytest.raises(ModuleNotFoundError):
        __import__(f"{code_folder.name}.training.sneaky")


@pytest.mark.parametrize(
    "asked",
    [
        ["a", "b"],
        {"prompt": ["a", "b"]},
        pd.DataFrame({"prompt": ["a", "b"]}),
        pd.DataFrame({"id": [1, 2], "prompt": ["a", "b"]}),
        pd.DataFrame(["a", "b"]),
        pd.DataFrame([{"prompt": ["a", "b"]}]),
    ],
)
def test_prompts_come_in_every_form(make, asked):
    model = served(make())
    files = model.predict(None, asked, {"seed": 5})
    assert [data[:4] for data in files] == [b"\x89PNG"] * 2
    expected = model.generator(["a", "b"], seed=5)
    np.testing.assert_array_equal(np.stack([pixels(data) for data in files]), expected)


def test_params_reach_the_generator(make):
    model = served(make())
    plain = model.predict(None, "p", {})
    for changed in ({"negative_prompt": "blue"}, {"guidance": 1.0}, {"steps": 3}, {"seed": 1}):
        assert model.predict(None, "p", changed) != plain, changed
    assert (
        model.predict(None, "p", {"negative_prompt": "", "guidance": 3.0, "seed": 0, "steps": None})
        == plain
    )


def test_options_are_a_json_object_of_what_else_a_call_knows(make):
    model = served(make())
    seen: list[dict] = []
    generator = model.generator

    def painter(prompts, **options):
        seen.append(options)
        return generator(prompts, seed=0)

    model.generator = painter
    model.predict(None, "p", {"options": '{"sampler": "ddim", "sr1.steps": 8}', "seed": 3})
    assert seen[0]["sampler"] == "ddim"
    assert seen[0]["sr1.steps"] == 8
    assert seen[0]["seed"] == 3
    model.predict(None, "p", {"options": ""})
    assert "sampler" not in seen[1]
    for odd, said in (("[1]", "wanted a JSON object"), ("{", "options: "), ('{"seed": 1}', "seed")):
        with pytest.raises(ValueError, match=said):
            model.predict(None, "p", {"options": odd})


def test_what_is_no_prompt_is_refused(make):
    with pytest.raises(ValueError, match="expected prompts as strings, got int"):
        served(make()).predict(None, [3], {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import training.late", r"generator.py:2: `import training.late`"),
        ("X = 'training.late:noise'", r"generator.py:2: .*'training.late:noise' in a string"),
        (
            "from training.gone import x",
            r"training.gone: imported by the generator's code, but not found",
        ),
    ],
)
def test_code_that_cannot_travel_is_refused(tmp_path, line, message):
    root = write(
        tmp_path, {"training/__init__.py": "", "training/generator.py": f'"""G."""\n{line}\n'}
    )
    with pytest.raises(ValueError, match=message):
        code(root)


def test_imports_become_relative_wherever_they_stand(tmp_path):
    files = {
        "training/__init__.py": "",
        "training/generator.py": (
            "def f():\n    é = 1; from training.a.b import (\n        g,\n    )\n    return g\n"
        ),
        "training/a/__init__.py": "from training.c import h\n",
        "training/a/b.py": "from pipeline import d\nfrom . import e\nfrom .. import c\ng = d\n",
        "training/a/e.py": "",
        "training/c.py": "h = 1\n",
        "pipeline/__init__.py": "",
        "pipeline/d.py": "",
    }
    sources, _ = code(write(tmp_path, files))
    assert set(sources) == {"__init__.py", *files}
    assert "    é = 1; from ..training.a.b import (\n" in sources["training/generator.py"].decode()
    assert sources["training/a/__init__.py"] == b"from ...training.c import h\n"
    assert sources["training/a/b.py"].startswith(b"from ...pipeline import d\nfrom . import e\n")


def test_serving_runs_where_darkroom_is_unknown(make, tmp_path):
    folder = make()
    script = """
import runpy, sys, types
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f)]
sys.path = [p for p in sys.path if "site-packages" in p or "/lib/python3" in p]
try:
    import training
except ImportError:
    pass
else:
    raise SystemExit("training can be imported: this test shows nothing")
names = runpy.run_path(sys.argv[1] + "/serving.py")
model = names["PackagedGenerator"]()
model.load_context(types.SimpleNamespace(artifacts={"package": sys.argv[1]}, model_config=None))
sys.stdout.buffer.write(model.predict(None, ["a red circle"])[0])
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(folder)],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    np.testing.assert_array_equal(
        pixels(done.stdout), serving.open_generator(folder)(["a red circle"])[0]
    )


NETWORKS: dict[str, dict[str, Any]] = {
    "autoencoder": {"network": {"channels": 8, "channel_mult": [1, 2], "latent_channels": 3}},
    "clip": {
        "embed": 24,
        "image": {"kind": "vit", "side": 16, "patch": 4, "width": 32, "layers": 1},
        "text": {"vocabulary": 1024, "context": 40, "width": 32, "layers": 1, "heads": 2},
    },
    "t5": {"width": 32, "layers": 1, "heads": 2, "feedforward": 64, "max_bytes": 96},
    "base": {
        "network": {
            "kind": "unet", "channels": 16, "channel_mult": [1], "attention": [1],
            "head_width": 16, "context_width": 32, "blocks": 1,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> Path:
    """A generator of real stages with untrained weights: it is the code that is tested."""
    from training.assembling import assemble

    root = tmp_path_factory.mktemp("real")
    done = untrained(root, NETWORKS, (3, 8, 8))
    assemble(root / "generator", done, {"steps": 3, "guidance": 2.0})
    return root / "generator"


@pytest.fixture(scope="session")
def real_package(real, tmp_path_factory) -> Path:
    from evaluation.packaging import package

    return Path(package(real, tmp_path_factory.mktemp("packages"), recipe={}, lineage={}))


def test_the_real_generator_travels(real, real_package):
    from training.generator import Generator

    prompts = ["a red circle", "two blue squares"]
    travelled = serving.open_generator(real_package, "cpu")
    here = Generator.load(real, "cpu")
    assert type(travelled) is not Generator
    np.testing.assert_array_equal(travelled(prompts, seed=5), here(prompts, seed=5))
    pins = {line.split("==")[0] for line in (real_package / "requirements.txt").read_text().split()}
    assert pins == {
        "einops", "jaxtyping", "mlflow", "numpy", "open_clip_torch", "pandas", "pillow",
        "safetensors", "torch", "transformers",
    }  # fmt: skip


@pytest.mark.slow
def test_the_real_generator_draws_in_a_fresh_process(real_package):
    from evaluation.registry import facts

    found = facts(str(real_package), lineage=())
    assert found == {"integrity": True, "lineage": True, "infra": True}
