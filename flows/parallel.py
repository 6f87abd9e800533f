"""Stages of a line that train beside each other, each in a process of its own.

A stage begins as soon as the stages that it learns from are there: one that enlarges and hears no
text needs the data alone, and waits for nobody. Its process runs the flow `train-stage` against the
Prefect API of its caller, its run in MLflow is nested in the line's, and where RAY_ADDRESS names a
cluster it drives a Ray Train job of its own.

A process's stdin is its caller's hand: it brings the order, and when it closes, because the caller
lets go or is dead, the training writes a checkpoint and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping
from typing import IO, TYPE_CHECKING, Any

from training import supervision

from . import ending, hanging
from .progress import say
from .recipe import DENOISING, Recipe
from .settings import prepare_environment

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from pipeline.manifest import Manifest

    from .line import Line

POLL_SECONDS = 0.2
ENDING_SECONDS = 60.0
"""How long a process that was told to end has for its checkpoint, Prefect and MLflow."""
AGAIN_SECONDS = 10.0
"""After which a process that did not hear is told once more: an exception of a signal's handler is
lost where Python happens to be in a `__del__`, and Prefect's handler raises one."""

Trained = tuple[str, dict[str, Any], float]
"""(stage, what `train-stage` says of it, time.monotonic() when it began)."""


def startable(recipe: Recipe, done: Collection[str], running: Collection[str]) -> list[str]:
    """The stages that may begin now, as many as there is room for: in the order of their making,
    but those that need nothing encoded first."""
    ready = [
        name
        for name in recipe.stages
        if name not in done and name not in running and set(recipe.inputs(name)) <= set(done)
    ]
    room = max(0, recipe.parallel - len(running))
    return sorted(ready[:room], key=lambda name: name in DENOISING and bool(recipe.inputs(name)))


def train_stages(
    line: Line, data: Manifest, run_id: str | None, encode: Callable[[str], None]
) -> Generator[Trained]:
    """Train all stages, at most `parallel` at once, and hand each over when it is done; call it in
    a flow's run.

    `encode(stage)` is called before a stage that draws begins. RuntimeError names the first stage
    that failed; the others were then told to end, and so they are by whatever else ends this. One
    that hangs is started again, for as long as it gets further.
    """
    from .steps import train_stage

    values, done = line.to_json(), set[str]()
    for name in line.recipe.stages:
        if line.recipe.stage(name).pretrained or line.result(name, data):
            started = time.monotonic()
            yield name, train_stage(values, name, run_id), started
            done.add(name)
    running: dict[str, StageProcess] = {}
    patience: dict[str, hanging.Patience] = {}
    try:
        while len(done) < len(line.recipe.stages):
            for name in startable(line.recipe, done, running):
                if name in DENOISING:
                    encode(name)
                taken = {it.slot for it in running.values()}
                slot = next(it for it in range(line.recipe.parallel) if it not in taken)
                running[name] = StageProcess(line, name, run_id, slot)
            time.sleep(POLL_SECONDS)
            for name in [name for name, it in running.items() if it.ended]:
                it = running.pop(name)
                said = it.failure()
                if it.hung:
                    folder = str(line.stage_dir(name, data))
                    patience[name] = patience.get(name, hanging.Patience()).after(folder)
                    said = patience[name].told(folder)
                    if not patience[name].over:
                        say(hanging.AGAIN.format(folder))
                        running[name] = StageProcess(line, name, run_id, it.slot, it.started)
                        continue
                if said:
                    raise RuntimeError(f"stage {name}: {said}{_told(running)}")
                done.add(name)
                yield name, {"stage": name, "reused": False}, it.started
    finally:
        _end(list(running.values()))


def _told(running: Collection[str]) -> str:
    if not running:
        return ""
    return f" ({', '.join(running)} told to write a checkpoint and end; the same command goes on)"


def _end(running: list[StageProcess]) -> None:
    """All write their checkpoints at the same time. Who interrupts this does not wait for them."""
    try:
        for it in running:
            it.tell_to_end()
        limit = time.monotonic() + ENDING_SECONDS
        while time.monotonic() < limit and not all(it.ended for it in running):
            time.sleep(POLL_SECONDS)
    finally:
        for it in running:
            it.kill()
            it.failure()


class StageProcess:
    """A process that trains one stage: `python -m flows.parallel`."""

    def __init__(
        self,
        line: Line,
        name: str,
        run_id: str | None,
        slot: int,
        started: float | None = None,
    ):
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        assert context is not None and context.flow_run is not None, "called outside a flow's run"
        self._client: SyncPrefectClient = context.client  # pyright: ignore[reportAttributeAccessIssue]
        self.name, self.slot = name, slot
        self.started = time.monotonic() if started is None else started
        order = {"line": line.to_json(), "name": name, "parent_run": run_id}
        self._run = _flow_run(self._client, context.flow_run, order)
        api = {"PREFECT_API_URL": str(self._client.api_url).rstrip("/")}
        self._answer = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=self._answer,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=_environment(line.recipe, name, slot) | api,
            process_group=0,  # a terminal's Ctrl-C comes to the caller, who tells us
        )
        assert self._process.stdin and self._process.stderr
        self._relay = threading.Thread(target=self._say, args=(self._process.stderr,), daemon=True)
        self._relay.start()
        with contextlib.suppress(BrokenPipeError):  # it is dead: `failure` will say so
            self._process.stdin.write(json.dumps({"flow_run": str(self._run.id), **order}) + "\n")
            self._process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def hung(self) -> bool:
        """Whether it ended because the training in it hung."""
        return self._process.returncode == supervision.HUNG

    def tell_to_end(self) -> None:
        """By what its caller's death would tell it as well."""
        assert self._process.stdin
        if not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write("end\n")
                self._process.stdin.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def failure(self) -> str | None:
        """Why the process, which has ended, failed; None where it did not."""
        self.tell_to_end()
        self._relay.join(5)  # what it said last
        code = self._process.returncode
        if not self._answer.closed:
            self._answer.seek(0)
            lines = self._answer.read().splitlines()
            self._answer.close()
            self._said = _answer(lines[-1]) if code == 1 and lines else {}
        if code == 0:
            return None
        why = "a training in it hung" if self.hung else f"ended with exit code {code}"
        if code < 0:
            why = f"killed by {signal.Signals(-code).name}"
            why += ", as a rule for memory: lower `parallel`" if code == -signal.SIGKILL else ""
        ending.crash(self._client, self._run, why)  # unless the run has ended by itself
        return self._said.get("error", why)

    def _say(self, stream: IO[str]) -> None:
        """Its progress is told as if it were ours; all else begins with the stage's name."""
        with stream:
            for line in stream:
                own = line.startswith(f"  train {self.name}:")
                if line.strip():
                    said = line.rstrip() if own else f"  {self.name}: {line.rstrip()}"
                    print(said, file=sys.stderr, flush=True)


def _answer(line: str) -> dict[str, str]:
    """What a process said last; nothing where it died in the middle of it."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _environment(recipe: Recipe, name: str, slot: int) -> dict[str, str]:
    """Stages share this machine's cores, and take turns at its GPUs where one worker will do."""
    from pipeline.execute import cpus, devices

    found = {"OMP_NUM_THREADS": str(max(1, cpus() // recipe.parallel)), **os.environ}
    gpus = devices()
    if gpus and int(recipe.stage(name).training.get("workers", 1)) == 1:
        found["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return found


def _flow_run(client: SyncPrefectClient, parent: FlowRun, parameters: Mapping[str, Any]) -> FlowRun:
    """A run of `train-stage` that Prefect shows within its caller's."""
    from prefect.states import Pending
    from prefect.tasks import Task

    from .steps import train_stage

    name = parameters["name"]
    place = client.create_task_run(
        Task(train_stage.fn, name=f"{train_stage.name} {name}"), parent.id, name, state=Pending()
    )
    given = train_stage.serialize_parameters(dict(parameters))
    return client.create_flow_run(
        train_stage, parameters=given, parent_task_run_id=place.id, state=Pending()
    )


def _end_with_the_caller() -> None:
    if not sys.stdin.read():  # dead: what is said to it from now on would fail
        with open(os.devnull, "w") as nobody:
            os.dup2(nobody.fileno(), 2)
    limit = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < limit:
        if not supervision.HEARD.is_set():  # a second signal would end what writes a checkpoint
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(AGAIN_SECONDS)
    os._exit(1)


def main() -> int:
    """What a stage's process does; {"error": ...} on stdout where it fails."""
    ending.end_on_sigterm()
    ending.owned_by(ending.end)
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    prepare_environment()
    from uuid import UUID

    from prefect.flow_engine import load_flow_run, run_flow

    from .steps import train_stage

    try:
        run = load_flow_run(UUID(order.pop("flow_run")))
        run_flow(train_stage, flow_run=run, parameters=order)
    except Exception as error:
        print("\n" + json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
