"""The command line: `darkroom COMMAND ...`, or `python -m flows COMMAND ...`.

Exit codes: 0 done, 1 failed, 2 bad usage or recipe, 3 a gate said no. With --json the last line of
stdout is one JSON object; everything else goes to stderr. A command in which a training hangs is
started again in place, by the same command line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from pipeline.filters import visible

from . import commands, data_commands, doctor, hanging, plan
from .ending import end_on_sigterm
from .progress import say
from .settings import prepare_environment

DONE, FAILED, USAGE, REFUSED = 0, 1, 2, 3

EPILOG = """\
RECIPE is a preset's name (darkroom recipes) or a YAML/JSON file; key=value overrides one of
its keys, e.g. darkroom run shapes base.training.images=300000 'data.sources=["photos"]'
MODEL is a registered model's name (its champion), models:/NAME/VERSION, models:/NAME@ALIAS or
a folder.
"""


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="darkroom",
        description="From captioned pictures to a text-to-image model in service.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def verb(name: str, help: str, run: Callable[..., dict[str, Any]]) -> argparse.ArgumentParser:
        it = verbs.add_parser(name, help=help, description=help, epilog=EPILOG)
        it.formatter_class = argparse.RawDescriptionHelpFormatter
        it.add_argument("--json", action="store_true", help="one JSON object as the last line")
        it.set_defaults(run=run)
        return it

    def recipe(it: argparse.ArgumentParser, default: str | None = None) -> None:
        if default:
            it.add_argument("recipe", nargs="?", default=default, metavar="RECIPE")
        else:
            it.add_argument("recipe", metavar="RECIPE")

    def overrides(it: argparse.ArgumentParser) -> None:
        it.add_argument("overrides", nargs="*", metavar="key=value")

    it = verb("run", "the whole line: ingest, train, encode, score, gate, register", commands.run)
    recipe(it, "shapes")
    overrides(it)
    it.add_argument("--fresh", action="store_true", help="train every stage anew")

    it = verb("ingest", "read sources into a data set's shards", data_commands.ingest)
    it.add_argument("sources", nargs="+", metavar="SOURCE")
    it.add_argument("--dataset", required=True, metavar="URL")
    it.add_argument(
        "--side",
        type=int,
        metavar="PIXELS",
        help=f"largest stored side; default: as the data set has it, {data_commands.NEW_SIDE} "
        "for a new one",
    )
    it.add_argument(
        "--rule",
        dest="rules",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as in data.ingest of a recipe, e.g. min_side=64 or near_duplicates=drop; what is not "
        "said is as the data set has it",
    )
    it.add_argument(
        "--scorers",
        default="[]",
        metavar="JSON",
        help="models whose scores the rules speak of, as data.scorers of a recipe has them",
    )

    it = verb("explain", "what became of an input of a data set, and why", data_commands.explain)
    it.add_argument("dataset", metavar="DATASET")
    it.add_argument("what", metavar="KEY", help="the beginning of a key, or a part of a row's id")

    it = verb("show", "a page about a data set: pictures, reasons, sizes", data_commands.show)
    it.add_argument("dataset", metavar="DATASET")
    it.add_argument("--version", type=int, default=None, metavar="N", help="default: the newest")
    it.add_argument("--out", default="dataset.html", metavar="PAGE")

    it = verb(
        "reproduce", "make a version again from its manifest, elsewhere", data_commands.reproduce
    )
    it.add_argument("dataset", metavar="DATASET")
    it.add_argument("--version", type=int, default=None, metavar="N", help="default: the newest")
    it.add_argument("--into", required=True, metavar="URL", help="a data set that is not there yet")

    it = verb("remove", "take pictures out of all versions, for good", data_commands.remove)
    it.add_argument("dataset", metavar="DATASET")
    it.add_argument("keys", nargs="*", metavar="KEY", help="as `darkroom explain` tells it")
    it.add_argument(
        "--keys", dest="files", action="append", default=[], metavar="FILE", help="a key a line"
    )
    it.add_argument("--reason", default="", metavar="TEXT", help="why, for the blocklist")

    it = verb("compact", "merge the small shards that growth leaves", data_commands.compact)
    it.add_argument("dataset", metavar="DATASET")

    it = verb("gc", "delete the files of a data set that no version lists", data_commands.gc)
    it.add_argument("dataset", metavar="DATASET")
    it.add_argument(
        "--keep", type=int, default=0, metavar="N", help="let all but the newest N versions expire"
    )
    it.add_argument("--dry-run", action="store_true", help="only tell what would go")

    it = verb("encode", "a recipe's data set through its encoders", commands.encode)
    recipe(it)
    overrides(it)

    it = verb("convert", "TAEF2's state dicts into a folder of safetensors", commands.convert)
    it.add_argument("encoder", metavar="ENCODER.pth")
    it.add_argument("decoder", metavar="DECODER.pth")
    it.add_argument("--out", required=True, metavar="DIR")

    it = verb("train", "one stage of a recipe, and what it needs", commands.train)
    recipe(it)
    it.add_argument("stage", metavar="STAGE")
    overrides(it)
    it.add_argument("--fresh", action="store_true", help="start over instead of resuming")

    it = verb("posthoc", "averages of another length of a trained stage", commands.posthoc)
    recipe(it)
    it.add_argument("stage", metavar="STAGE")
    overrides(it)
    it.add_argument(
        "--sigma-rel",
        type=float,
        required=True,
        metavar="S",
        help="length, as a share of the training (0.03 to 0.25); it must have left snapshots "
        "(training.ema_sigma_rel)",
    )
    it.add_argument("--images", type=int, metavar="N", help="as it was then; default: at the end")
    it.add_argument("--out", required=True, metavar="DIR")

    it = verb("sample", "draw pictures from prompts", commands.sample)
    it.add_argument("model", metavar="MODEL[?KEY=VALUE&...]", help="e.g. shapes?sampler=heun")
    it.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="may be left out with --low, --map or --label",
    )
    it.add_argument("--out", required=True, metavar="DIR")
    it.add_argument("--negative", default=None, metavar="TEXT", help="what must not be seen")
    it.add_argument("--guidance", type=float, default=None, metavar="S")
    it.add_argument("--steps", type=int, default=None, metavar="N")
    it.add_argument("--seed", type=int, default=0, metavar="K")
    it.add_argument("--count", type=int, default=1, metavar="N", help="pictures of each prompt")
    it.add_argument(
        "--low",
        default=None,
        metavar="FILE",
        help="the small picture that is enlarged, or a folder of them: each with each prompt",
    )
    it.add_argument(
        "--level", type=float, default=None, metavar="X", help="how strongly that is damaged first"
    )
    it.add_argument(
        "--map",
        default=None,
        metavar="FILE",
        help="the label map that is drawn by, a PNG of indices of classes, or a folder of them: "
        "each with each prompt",
    )
    it.add_argument(
        "--label",
        dest="labels",
        action="append",
        default=[],
        metavar="NAME=ANSWER",
        help="of the class to draw, e.g. shape=circle; as often as there are names",
    )

    it = verb("edit", "draw one thing in another's place in given pictures", commands.edit)
    it.add_argument(
        "model",
        metavar="MODEL[?KEY=VALUE&...]",
        help="one with an edit stage, e.g. shapes-diffusionclip?noise=0.5",
    )
    it.add_argument(
        "--pictures", required=True, metavar="PLACE", help="a picture file, or a folder of them"
    )
    it.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="gets a PNG file of each, by its name; another folder than theirs",
    )
    it.add_argument(
        "--noise",
        type=float,
        default=None,
        metavar="T",
        help="how far towards noise pictures are taken, which bounds what can change: above 0, up "
        "to 1; default: this and the steps as it was trained",
    )
    it.add_argument(
        "--inversion-steps", type=int, default=None, metavar="N", help="of DDIM, to the noise"
    )
    it.add_argument("--steps", type=int, default=None, metavar="N", help="of DDIM, from the noise")
    it.add_argument(
        "--unedited",
        action="store_true",
        help="to the noise and back by the base alone: what the way itself costs",
    )

    it = verb(
        "serve",
        "a registered model over HTTP, by MLflow's server: it draws, and edits if it can",
        commands.serve,
    )
    it.add_argument("model", metavar="MODEL")
    it.add_argument("--host", default="127.0.0.1", metavar="ADDRESS")
    it.add_argument("--port", type=int, default=8080, metavar="N")

    it = verb("evaluate", "score a registered model anew", commands.evaluate)
    it.add_argument("model", metavar="MODEL")

    it = verb("compare", "the same prompts and seeds, drawn side by side", commands.compare)
    it.add_argument("models", nargs="+", metavar="MODEL[?KEY=VALUE&...]")
    it.add_argument("--out", default="comparison.html", metavar="PAGE")
    it.add_argument("--prompts", type=int, default=64, metavar="N")
    it.add_argument("--title", default=None, metavar="TEXT")
    it.add_argument("--gallery", default=None, metavar="PNG", help="a picture, a row a model")

    it = verb("promote", "put a registered version through the gate", commands.promote)
    it.add_argument("model", metavar="MODEL")
    it.add_argument("--dry-run", action="store_true", help="decide, change nothing")

    it = verb("rollback", "make the previous champion the champion again", commands.rollback)
    it.add_argument("name", metavar="NAME")

    it = verb("plan", "what a recipe needs and costs, before anything is spent", plan.plan)
    recipe(it)
    overrides(it)
    it.add_argument("--device", metavar="NAME", help="e.g. h100; default: this machine, probed")
    it.add_argument("--workers", type=int, metavar="N", help="default: training.workers")
    it.add_argument("--samples", type=int, metavar="N", help="pictures to store")
    it.add_argument("--words", type=int, default=20, metavar="N", help="in a caption, on average")
    it.add_argument("--price", type=float, metavar="X", help="of a device-hour")

    verb("recipes", "the presets and what each is for", commands.recipes_)
    verb("doctor", "check this machine and its settings", doctor.doctor)
    verb("status", "data sets, stages and models of this home", commands.status)

    it = verb("deploy", "serve the scheduled retraining of a recipe", commands.deploy)
    recipe(it, "shapes")
    overrides(it)
    return root


def main(arguments: list[str] | None = None) -> int:
    """The exit code. Without `arguments` this process is the command's and nobody else's."""
    command = hanging.Command() if arguments is None else None
    known, extra = parser().parse_known_args(arguments)
    options = vars(known)
    late = [word for word in extra if "=" in word and not word.startswith("-")]
    if late != extra or (late and "overrides" not in options):
        odd = [word for word in extra if word not in late] or late
        parser().error(f"unrecognised: {' '.join(odd)}")
    if late:  # overrides that stand behind an option
        options["overrides"] = [*options["overrides"], *late]
    run, as_json = options.pop("run"), options.pop("json")
    if options.pop("command") != "deploy" and not os.environ.get("DARKROOM_DEBUG"):
        # Prefect shows an error with its stack, once for each flow around it; here a line will do.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    if options.get("recipe") and "=" in options["recipe"]:
        # `darkroom run key=value`: the first override stands where the recipe may stand.
        options["overrides"] = [options["recipe"], *options["overrides"]]
        options["recipe"] = "shapes"
    prepare_environment()
    end_on_sigterm()
    with _stdout_kept() as stdout:

        def tell(result: dict[str, Any]) -> None:
            if as_json:
                stdout.answer(json.dumps(result, default=str))
            elif "text" in result:
                stdout.answer(visible(result["text"]))
            if "error" in result:
                say(visible(f"darkroom: {result['error']}"))  # it may quote what strangers wrote

        def leave(code: int, error: str) -> NoReturn:
            tell({"error": error})
            os._exit(code)

        if command:
            command.owns(leave, stdout.give_back)
        code, result = outcome(run, options)
        tell(result)
    return code


def outcome(
    run: Callable[..., dict[str, Any]], options: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """(exit code, result) of a command; {"error": ...} where there is none."""
    from .recipe import RecipeError

    try:
        result = run(**options)
    except (RecipeError, commands.UsageError) as error:
        return USAGE, {"error": str(error)}
    except BaseException as error:
        if (code := _told_to_end(error)) is not None:
            said = "interrupted" if code == 128 + signal.SIGINT else "stopped"
            return code, {"error": said + hanging.GOES_ON}
        if os.environ.get("DARKROOM_DEBUG"):
            raise
        where = "" if isinstance(error, ValueError | OSError) else " (DARKROOM_DEBUG=1 shows where)"
        return FAILED, {"error": f"{type(error).__name__}: {error}{where}"}
    return (REFUSED if result.get("refused") else DONE), result


def _told_to_end(error: BaseException | None) -> int | None:
    """The exit code, where what went wrong did so because we were ending: a Prefect server that
    has ended too cannot be told of it, and that error is what comes out.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return 128 + signal.SIGINT
        if isinstance(error, SystemExit):
            return int(error.code or 0)
        if type(error).__name__ == "TerminationSignal":  # Prefect's, which need not be imported
            return 128 + signal.SIGTERM
        error = error.__context__
    return None


class _stdout_kept:
    """Whatever a library prints goes to stderr; stdout gets the answer alone."""

    def __enter__(self) -> _stdout_kept:
        sys.stdout.flush()
        self._kept = os.dup(1)
        os.dup2(2, 1)
        return self

    def answer(self, text: str) -> None:
        with os.fdopen(os.dup(self._kept), "w") as out:
            out.write(text.rstrip("\n") + "\n")

    def give_back(self) -> None:
        os.dup2(self._kept, 1)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        self.give_back()
        os.close(self._kept)


if __name__ == "__main__":
    sys.exit(main())
