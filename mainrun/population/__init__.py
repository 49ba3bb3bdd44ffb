"""Runs that share one compiled step: one after another, or side by side under `vmap`."""

from mainrun.population.choice import Choice
from mainrun.population.group import Group, Running

__all__ = ["Choice", "Group", "Running"]
