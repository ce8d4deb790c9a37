"""Whole runs as values: every function here returns a frozen configuration."""

from rung.recipes.arithmetic import arithmetic

__all__ = ["arithmetic"]
