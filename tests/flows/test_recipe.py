"""A recipe's keys have one spelling; a wrong one is refused with the nearest right one."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from flows import recipe as recipes
from flows.presets import PRESETS
from flows.recipe import RecipeError, check_stages, load, parse
from pipeline import storage


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json_and_their_stages_accept_them(name):
    made = PRESETS[name]()
    assert parse(json.loads(made.model_dump_json())) == made
    recipes.check_stages(made)


def test_the_guidance_that_a_preset_names_is_one_that_it_is_scored_with():
    """The sweep's choice takes the place of the sampler's guidance."""
    named = {
        name: (recipe.sampler["guidance"], recipe.evaluation.guidance_scales)
        for name, recipe in ((name, make()) for name, make in PRESETS.items())
        if "guidance" in recipe.sampler
    }
    assert "sd-512" in named
    assert all(guidance in scales for guidance, scales in named.values()), named


def test_overrides_reach_every_depth():
    made = load("shapes", ["seed=7", "base.training.images=100", "data.ingest.min_side=8"])
    assert (made.seed, made.base.training["images"], made.data.ingest.min_side) == (7, 100, 8)
    assert made.base.training["batch"] == load("shapes").base.training["batch"]


def test_a_file_names_the_preset_it_changes(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: shapes\nname: mine\ndata: {scenes: 500}\n")
    made = load(str(file), ["seed=3"])
    assert (made.name, made.data.scenes, made.seed) == ("mine", 500, 3)
    assert made.base == load("shapes").base


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sede=1", "did you mean 'seed'"),
        ("data.scense=10", "did you mean 'scenes'"),
        ("data.ingest.min_sid=10", "did you mean 'min_side'"),
        ("evaluation.promts=64", "did you mean 'prompts'"),
        ("data.scenes=-1", "data.scenes"),
        ("data.scenes=many", "data.scenes"),
        ("seed", "expected key=value"),
        ("seed.inner=1", "seed is a value"),
    ],
)
def test_a_wrong_key_or_value_is_named(override, told):
    with pytest.raises(RecipeError, match=told):
        load("shapes", [override])


def test_memory_is_a_place_for_one_process():
    with pytest.raises(RecipeError, match="memory://x: each worker"):
        load("shapes", ["data.dataset=memory://x"])
    made = load("shapes", ["data.dataset=memory://x", "executor.kind=local"])
    assert made.data.dataset == "memory://x"
    with pytest.raises(RecipeError, match="memory://x: each worker"):
        load("shapes", ["data.dataset=memory://x", "executor.kind=local", "parallel=2"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("base.config.network.chanels=8", "did you mean 'channels'"),
        ("base.training.learning_rate=-1", "learning_rate"),
        ("autoencoder.config.kll=1", "did you mean 'kl'"),
        ("clip.training.micro_batch=8", "clip: its loss compares.*set micro_batch to 0"),
        ("clip.training.workers=7", "7 workers .* do not divide"),
        ("base.training.accelerator=h10", "did you mean 'h100'"),
    ],
)
def test_stage_configs_are_checked_by_the_stages(override, told):
    with pytest.raises(RecipeError, match=told):
        recipes.check_stages(load("shapes", [override]))


@pytest.mark.parametrize(
    ("recipe", "override", "told"),
    [
        # a classifier judges the noise levels of its base
        ("shapes", "classifier.training.images=64", "guides pixels alone"),
        ("shapes-edm", "classifier.training.images=64", "make the two equal"),
        ("shapes-classifier", "base.config.diffusion.path=vp", "make the two equal"),
        # a sampler draws from its base
        ("shapes", "sampler.grid=karras", "sampler: karras grid on path 'flow'"),
        ("shapes-ddpm", "sampler.variance=learned", "learned_variance=true"),
        ("shapes", "sampler.stepps=3", "did you mean 'steps'"),
        ("shapes", "sampler.threshold=static", "sampler.threshold: got 'static', .* latents are"),
        (
            "shapes-unclip",
            "prior.sampler.threshold=dynamic",
            "prior.sampler.threshold: .*embeddings",
        ),
    ],
)
def test_what_the_base_cannot_be_used_with_is_refused_before_the_training(recipe, override, told):
    with pytest.raises(RecipeError, match=told):
        recipes.check_stages(load(recipe, [override]))


@pytest.mark.parametrize(
    ("preset", "options", "said"),
    [
        ("shapes", {"stepps": [3]}, "stepps: sampler: no key 'stepps'; did you mean 'steps'"),
        ("shapes", {"negative": ["x"]}, "no key 'negative' (known: corrections"),
        ("shapes", {"steps": [8, "many"]}, "evaluation.options.steps: sampler.steps: got 'many'"),
        ("shapes", {"steps": [0]}, "steps: got 0, wanted at least 1"),
        ("shapes", {"grid": ["uniform", "karras"]}, "karras grid on path 'flow'"),
        ("shapes", {"guidance_interval": [0.2, 0.8]}, "got 0.2, wanted a list"),
        ("shapes", {"level": [0.0, 0.1]}, "the base enlarges no picture"),
        ("shapes", {"sr1.level": [0.0]}, "no stage 'sr1' that draws beside the base"),
        ("shapes-cdm", {"sr3.level": [0.0]}, "no stage 'sr3' that draws"),
        ("shapes-cdm", {"base.steps": [8]}, "there are sr1., sr2., and the base's own"),
        ("shapes-cdm", {"sr1.lvel": [0.0]}, "sr1.sampler: no key 'lvel'; did you mean 'level'"),
        ("shapes-cdm", {"sr1.level": [0.0, 0.9]}, "got 0.9, and it learnt noise from 0 to 0.3"),
        ("shapes-cdm", {"sr1.variance": ["learned"]}, "needs a network that learns it"),
        ("shapes-vae", {"steps": [8]}, "evaluation.options: there is no base"),
        ("shapes", {"threshold": ["none", "dynamic"]}, "threshold: got 'dynamic', which bounds"),
        ("shapes", {"guidance_interval": [[0.8, 0.2]]}, "got (0.8, 0.2), wanted two times"),
    ],
)
def test_options_that_cannot_be_swept_are_refused_before_the_training(preset, options, said):
    recipe = load(preset, [f"evaluation.options={json.dumps(options)}"])
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_stages(recipe)


def test_options_are_named_as_any_other_key():
    swept = {"sr1.level": (0.0, 0.05, 0.15), "sr2.level": (0.0, 0.25, 0.5)}
    assert load("shapes-cdm").evaluation.options == swept
    words = ["evaluation.options.sr1.level=[0.1]", "evaluation.options.steps=[8, 16]"]
    changed = load("shapes-cdm", words)
    assert changed.evaluation.options == {**swept, "sr1.level": (0.1,), "steps": (8, 16)}
    assert [*changed.evaluation.options] == ["sr1.level", "sr2.level", "steps"]
    assert load("shapes-cdm", ["evaluation.options={}"]).evaluation.options == {}
    fewer = load("shapes-cdm", ["evaluation.options.sr1.level=null"])
    assert [*fewer.evaluation.options] == ["sr2.level"]
    with pytest.raises(RecipeError, match="evaluation.options: .*steps: got 8, wanted a list"):
        load("shapes", ["evaluation.options.steps=8"])


def test_a_recipe_draws_by_the_options_that_were_chosen():
    plain = load("shapes-cdm")
    chosen = plain.with_options({"guidance": 2.0, "steps": 8, "sr1.level": 0.05})
    assert chosen.sampler == {**plain.sampler, "guidance": 2.0, "steps": 8}
    assert chosen.samplers["sr1"] == {**plain.samplers["sr1"], "level": 0.05}
    assert chosen.samplers["sr2"] == plain.samplers["sr2"]
    assert plain.with_options({}).identity == plain.identity


def test_options_decide_the_result_and_their_order_does():
    words = '{"steps": [8], "guidance_interval": [[0, 1]]}'
    turned = '{"guidance_interval": [[0, 1]], "steps": [8]}'
    made = [load("shapes", [f"evaluation.options={it}"]) for it in ("{}", words, turned)]
    assert len({it.identity for it in made}) == 3
    assert made[0].identity == load("shapes").identity
    assert "options" not in made[0].model_dump(mode="json")["evaluation"]
    # The package keeps its recipe in JSON that is sorted, and is found by it again.
    for it in made:
        assert (
            parse(json.loads(storage.json_bytes(it.model_dump(mode="json")))).identity
            == it.identity
        )


def test_below_an_optional_stage_too_the_nearest_key_is_named():
    with pytest.raises(RecipeError, match=r"classifier\.trainig.*did you mean 'training'"):
        load("shapes-classifier", ["classifier.trainig.images=5"])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'shapes'"):
        load("shape")


def test_identity_is_what_decides_the_result():
    plain = load("shapes")
    same = [
        "base.training.workers=2",
        "base.training.micro_batch=16",
        "base.training.fsdp=true",
        "base.training.keep_images=10000",
        "base.training.preview_images=500",
        "base.training.stall_seconds=60",
        "base.training.max_skipped=9",
        "schedule=0 4 * * *",
        "executor.workers=1",
        "parallel=2",
    ]
    assert load("shapes", same).identity == plain.identity
    patient = ["base.training.patience_images=100", "base.training.heldout_pictures=8"]
    assert load("shapes", patient[1:]).identity == plain.identity
    assert load("shapes", patient).identity != load("shapes", patient[:1]).identity
    assert load("shapes", ["seed=1"]).identity != plain.identity
    assert load("shapes", ["base.training.images=1"]).identity != plain.identity


def test_asking_what_a_recipe_means_imports_nothing_heavy():
    code = (
        "import sys; import flows.commands, flows.recipe, flows.line; "
        "flows.recipe.load('shapes'); "
        "print([m for m in ('torch', 'ray', 'open_clip', 'mlflow', 'transformers', 'prefect') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_to_train_one_stage_prefect_is_not_imported():
    """That takes a second or more, and a command that is no flow has no use for it."""
    code = (
        "import sys; import flows.__main__, flows.build_dataset, flows.train_stage; "
        "from training import distributed, tracking; print('prefect' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_autoencoder_that_looks_through_the_recipes_clip_comes_after_it():
    """Only where it does: identities of all other recipes stay what they were."""
    plain, seen = load("shapes"), load("shapes", ['autoencoder.config.perceptual={"weight": 0.5}'])
    assert plain.stages == ("autoencoder", "clip", "t5", "base")
    assert plain.inputs("autoencoder") == ()
    assert seen.stages == ("clip", "autoencoder", "t5", "base")
    assert seen.inputs("autoencoder") == ("clip",)
    assert seen.inputs("base") == ("clip", "autoencoder", "t5")
    recipes.check_stages(seen)
    for override in ("autoencoder.config.perceptual.tower=a-clip", "autoencoder.pretrained=a-vae"):
        other = load("shapes", ['autoencoder.config.perceptual={"weight": 0.5}', override])
        assert other.inputs("autoencoder") == ()
        assert other.stages == plain.stages


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("autoencoder.config.network.codebook.codes=1", "codes must be at least 2"),
        ("autoencoder.config.adversarial.weight=0", "weight and limit must be positive"),
        ("base.config.network.recompute=3", "recompute: got 3, wanted bool"),
    ],
)
def test_options_are_checked_where_they_are(option, told):
    with pytest.raises(RecipeError, match=told):
        recipes.check_stages(load("shapes", [option]))


@pytest.mark.parametrize(
    ("preset", "changes", "said"),
    [
        ("shapes-unclip", ["data.encode.flip=true"], "CLIP embeds pictures as they are"),
        ("shapes-cdm", ["data.encode.max_aspect=2"], "base shrinks squares alone"),
        ("shapes-cdm", ["sr1.sampler.level=0.9"], "sr1.sampler.level: got 0.9, and it learnt"),
        ("shapes-cdm", ["sr1.sampler.variance=learned"], "needs a network that learns it"),
        ("shapes-cdm", ["sr1.sampler.stepps=3"], "sr1.sampler: no key 'stepps'"),
        ("shapes-cdm", ["sr1.config.low.side=8"], "got 8, and base draws 16 px"),
        ("shapes-cdm", ["sr1=null"], "sr2: it enlarges what sr1 drew, and there is none"),
        ("shapes-cdm", ["sr2=null"], "sr1.config.side: got 32, the last stage draws data.side: 64"),
        ("shapes-cdm", ["base.config.side=24", "sr1=null", "sr2=null"], "got 24, no divisor"),
        ("shapes-cdm", ["edit={}"], "edit: it edits pictures of data.side"),
        ("shapes-cdm", ["base.sampler.steps=3"], "base.sampler: only stages before and after"),
        ("shapes-glide", ["noisy_clip.config.side=0"], "got 0, and the base that it guides draws"),
        (
            "shapes-flow", ['base.config={"data": "embedding", "network": {"kind": "prior"}}'],
            "the base draws pictures or latents",
        ),
        ("shapes-flow", ["sampler.level=0.1"], "sampler.level: the base enlarges no picture"),
        ("shapes-sr3", ["sampler.level=0.1"], "got 0.1, and it learnt none from 0 to 0"),
        ("shapes-sr3", ["edit={}"], "edit: it edits by what draws from nothing"),
        ("shapes-ldm-low", ["base.config.low.side=32"], "got 32, no proper divisor of 32"),
        ("shapes-ldm-low", ["data.encode.max_aspect=2"], "base shrinks squares alone"),
        ("shapes-ldm-map", ["data.encode.max_aspect=2"], "base shrinks squares alone"),
        ("shapes-ldm-map", ["base.config.map.palette=[]"], "no palette and no segmenter"),
        (
            "shapes-cdm", ['sr1.config.map={"palette": [["a", [0, 0, 0]], ["b", [9, 9, 9]]]}'],
            "sr1.config.map: the base alone is told label maps",
        ),
        (
            "shapes-flow",
            ['base.config.map={"palette": [["a", [0, 0, 0]], ["b", [9, 9, 9]]]}', "edit={}"],
            "edit: it edits by what draws from nothing; set base.config.map=null",
        ),
        ("shapes-unclip", ['base.config.listens=["clip"]'], "which the base does not listen to"),
    ],
)  # fmt: skip
def test_stages_that_do_not_fit_together_are_refused_before_anything_is_trained(
    preset, changes, said
):
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_stages(load(preset, changes))


def test_an_enlarging_stage_that_hears_t5_changes_no_base_that_does_not():
    only = 'base.config.listens=["clip"]'
    heard = load("shapes-glide", [only])
    silent = load("shapes-glide", [only, 'sr1.config.listens=["clip"]'])
    assert "t5" in heard.stages
    assert "t5" not in silent.stages
    assert heard.inputs("base") == silent.inputs("base") == ("clip",)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("autoencoder.pretrained=some/where", "unset autoencoder.pretrained"),
        ("autoencoder.config.network.codebook.codes=64", "without a codebook"),
        ("classifier.training.images=64", "no base for it to work with"),
    ],
)
def test_an_autoencoder_alone_is_a_recipe(override, said):
    recipe = load("shapes", ["base=null"])
    check_stages(recipe)
    assert recipe.stages == ("autoencoder", "clip")
    with pytest.raises(RecipeError, match=said):
        check_stages(load("shapes", ["base=null", override]))
