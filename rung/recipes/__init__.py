"""Whole runs as values: every function here returns a frozen configuration."""

from rung.recipes.arithmetic import arithmetic
from rung.recipes.chain_sum import chain_sum
from rung.recipes.jsonl import gpu_jsonl, grpo
from rung.recipes.working import working

__all__ = ["arithmetic", "chain_sum", "gpu_jsonl", "grpo", "working"]
