"""The tiny model and a whole run of it, made once for all tests of training."""

from pathlib import Path

import pytest
from train.tiny import tiny_folder, tiny_recipe

import rung


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def whole(folder, tmp_path_factory):
    """An uninterrupted run."""
    return rung.train(tiny_recipe(folder), folder=tmp_path_factory.mktemp("runs") / "whole")
