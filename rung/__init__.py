"""Rung: reinforcement learning, rung by rung, from the Bellman equation to reasoning language models."""

__version__ = "0.1.0"
