"""What is asked of a figure, and whether it has it: said beside the figure, and decided by nobody,
for on a busy machine either may be chance."""

from __future__ import annotations


def at_least(value: float, target: float) -> str:
    return f"target at least {target:g}: {'met' if value >= target else 'MISSED'}"


def at_most(value: float, target: float, unit: str) -> str:
    return f"target at most {target:g} {unit}: {'met' if value <= target else 'MISSED'}"
