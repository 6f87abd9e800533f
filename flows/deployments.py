"""The scheduled retraining: serves a recipe's deployment until it is stopped."""

from __future__ import annotations

from typing import Any

from .recipe import Recipe


def deployment_name(recipe: Recipe) -> str:
    return f"retrain-{recipe.name}"


def serve(recipe: Recipe, source: str, overrides: list[str]) -> None:
    """Blocks: runs the deployment's scheduled runs, and those started from the UI or the API.

    `source` and `overrides` are what the recipe was made from: a run reads the file again.
    """
    from .retrain import retrain

    parameters: dict[str, Any] = {"recipe": source, "overrides": overrides}
    retrain.serve(
        name=deployment_name(recipe),
        cron=recipe.schedule,
        parameters=parameters,
        tags=["darkroom", recipe.name],
        description=f"Retrains {recipe.name} on what is new, and promotes it if it is no worse.",
        limit=1,  # two runs of one line would only wait for each other
    )
