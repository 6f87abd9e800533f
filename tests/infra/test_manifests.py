"""What can be known of the manifests without a Docker daemon, a cluster or a server."""

import copy
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SCHEMAS = Path(__file__).parent / "schemas"


def read(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def check(document: Any, schema: str) -> None:
    validator = Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text()))
    validator.check_schema(validator.schema)
    if error := best_match(validator.iter_errors(document)):
        raise ValueError(f"{error.json_path}: {error.message}")


COMPOSE = read("compose.yaml")
JOB = read("kuberay/rayjob.yaml")


# Compose


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_specification(name):
    check(read(name), "compose")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("services", "mlflow", "enviroment"), {}, r"'enviroment' was unexpected"),
        (("services", "mlflow", "healthcheck", "interval"), "10 seconds", r"interval"),
        (("services", "worker", "depends_on", "prefect", "condition"), "healthy", r"condition"),
        (("services", "prefect", "ports"), ["4200"], r"ports"),
        (("volume",), {}, r"'volume' does not match"),
    ],
)
def test_the_compose_check_finds_mistakes(path, value, message):
    broken = copy.deepcopy(COMPOSE)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        check(broken, "compose")


def test_compose_hangs_together():
    services = COMPOSE["services"]
    assert set(services) == {"postgres", "mlflow", "prefect", "worker", "ray-head", "ray-worker"}
    for name, service in services.items():
        assert "healthcheck" in service, name
        for other in service.get("depends_on", {}):
            assert other in services, f"{name} depends on {other}"
        for kind in ("configs", "secrets"):
            for used in service.get(kind, []):
                assert (used["source"] if isinstance(used, dict) else used) in COMPOSE[kind]
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network: {port}"
    assert {service["image"] for name, service in services.items() if name != "postgres"} == {
        "darkroom"
    }
    for name in read("compose.gpu.yaml")["services"]:
        assert name in services


def commands(service: dict[str, Any]) -> Iterator[list[str]]:
    """The command lines that a service and its health check run."""
    for words in (service.get("command", []), service["healthcheck"]["test"][1:]):
        if words[:2] == ["bash", "-euc"]:
            yield from (
                line.removeprefix("exec ").split() for line in words[2].splitlines() if line.strip()
            )
        elif words:
            yield words


@functools.cache
def options(command: tuple[str, ...]) -> set[str]:
    """The options that a command line tool of the environment knows."""
    if command[0] == "mlflow":
        import mlflow.cli as tool

        found = tool.cli.commands[command[1]]
    elif command[0] == "ray":
        import ray.scripts.scripts as tool

        found = tool.cli.commands[command[1]]
    else:
        # `python -m`: the tests may run without the environment's bin folder on PATH.
        words = [sys.executable, "-m", *command, "--help"]
        environment = {**os.environ, "COLUMNS": "200"}
        page = subprocess.run(
            words, capture_output=True, text=True, check=True, env=environment
        ).stdout
        return set(re.findall(r"--[a-z][a-z-]+", page))
    return {
        option for parameter in found.params for option in parameter.opts + parameter.secondary_opts
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_option_in_compose_exists():
    seen = 0
    for name, service in COMPOSE["services"].items():
        for words in commands(service):
            if words[0] not in ("mlflow", "ray", "prefect"):
                continue
            named = [
                word.split("=")[0]
                for word in words
                if word.startswith("--") and word != "--no-prompt"
            ]
            plain = [word for word in words if not word.startswith("--")]
            depth = 3 if words[0] == "prefect" and "deploy" not in words else 2
            known = options(tuple(plain[:depth]))
            assert set(named) <= known, f"{name}: {' '.join(words)}"
            seen += len(named)
    assert seen > 15


# Kubernetes


def pods(job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = job["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]
    yield from ((group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"])


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}


def check_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_rayjob_follows_the_custom_resource():
    check(JOB, "rayjob")


@pytest.mark.parametrize("name", [name for name, _ in pods(JOB)])
def test_its_pod_templates_are_pods(name):
    check_kubernetes(as_pod(dict(pods(JOB))[name]))


def test_storage_is_valid():
    for document in yaml.safe_load_all((INFRA / "kuberay" / "storage.yaml").read_text()):
        check_kubernetes(document)


def test_the_rayjob_check_finds_mistakes():
    broken = copy.deepcopy(JOB)
    broken["spec"]["rayClusterSpec"]["rayVersionn"] = "2"
    with pytest.raises(ValueError, match="'rayVersionn' was unexpected"):
        check(broken, "rayjob")
    broken = copy.deepcopy(JOB)
    broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "one"
    with pytest.raises(ValueError, match="'one' is not of type 'integer'"):
        check(broken, "rayjob")
    pod = as_pod(copy.deepcopy(next(pods(JOB))[1]))
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check_kubernetes(pod)


def test_the_cluster_asks_for_a_token_and_a_gpu():
    cluster = JOB["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    gpu = dict(pods(JOB))["gpu"]["spec"]["containers"][0]["resources"]
    assert gpu["limits"]["nvidia.com/gpu"] == "1"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_cluster_runs_the_locked_ray():
    lock = (ROOT / "requirements.lock").read_text()
    assert f"\nray=={JOB['spec']['rayClusterSpec']['rayVersion']} " in lock


def test_what_the_pods_mount_and_read_is_there():
    stored = list(yaml.safe_load_all((INFRA / "kuberay" / "storage.yaml").read_text()))
    names = {(document["kind"], document["metadata"]["name"]) for document in stored}
    for _, template in pods(JOB):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert (
                    "PersistentVolumeClaim",
                    volume["persistentVolumeClaim"]["claimName"],
                ) in names
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
            for source in container["envFrom"]:
                assert ("ConfigMap", source["configMapRef"]["name"]) in names


def test_the_recipe_of_the_job_is_a_recipe(tmp_path):
    from flows.recipe import load

    *_, recipe = yaml.safe_load_all((INFRA / "kuberay" / "storage.yaml").read_text())
    ((name, text),) = recipe["data"].items()
    assert f"/recipes/{name}" in JOB["spec"]["entrypoint"].split()
    (tmp_path / name).write_text(text)
    assert load(str(tmp_path / name)) == load("shapes")


# Prefect


def test_prefect_knows_every_key_of_the_deployment():
    from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel

    raw = read("prefect.yaml")
    PrefectYamlModel.model_validate(raw)
    # Prefect ignores keys that it doesn't know; a typing mistake must not be silent.
    fields = PrefectYamlModel.model_fields
    assert set(raw) <= set(fields) | {field.alias for field in fields.values()}
    for deployment in raw["deployments"]:
        assert set(deployment) <= set(DeploymentConfig.model_fields)


def test_the_deployment_is_the_retraining_flow_with_its_parameters():
    from prefect.flows import load_flow_from_entrypoint

    from flows.recipe import load

    (deployment,) = read("prefect.yaml")["deployments"]
    path, _, function = deployment["entrypoint"].partition(":")
    flow = load_flow_from_entrypoint(f"{ROOT / path}:{function}")
    assert flow.validate_parameters(deployment["parameters"]) == deployment["parameters"]
    with pytest.raises(Exception, match="recipee"):
        flow.validate_parameters({"recipee": "shapes"})
    (schedule,) = deployment["schedules"]
    recipe = load(deployment["parameters"]["recipe"], deployment["parameters"]["overrides"])
    assert schedule["cron"] == recipe.schedule


def test_a_run_starts_in_the_checkout_it_was_deployed_from(monkeypatch):
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.utilities.importtools import from_qualified_name
    from prefect.utilities.templating import apply_values

    monkeypatch.setenv("PWD", str(ROOT))
    monkeypatch.chdir("/")
    raw = read("prefect.yaml")
    ((name, inputs),) = apply_values(raw["pull"], {})[0].items()
    from_qualified_name(name)(**inputs)
    assert Path.cwd() == ROOT
    CronSchedule(cron=raw["deployments"][0]["schedules"][0]["cron"])


# Docker, make, CI


def test_the_image_holds_what_it_copies_and_runs_as_a_user():
    lines = (INFRA / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    for copied in (line[1:-1] for line in words if line[0] == "COPY"):
        for name in copied:
            assert (ROOT / name).exists(), name
    packages = {line[1] for line in words if line[0] == "COPY"}
    assert {"flows", "pipeline", "training", "evaluation"} <= packages
    assert [line[1] for line in words if line[0] == "USER"] == ["darkroom"]
    last_run = max(i for i, line in enumerate(words) if line[0] == "RUN")
    assert words.index(["USER", "darkroom"]) > last_run


@pytest.mark.parametrize("target", ["demo", "test", "lint", "slow", "soak", "bench", "lock"])
def test_make_knows_its_targets(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_is_a_script_that_parses():
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
