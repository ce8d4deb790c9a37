"""Tests are stricter than use: shapes are checked, warnings are errors, sockets are closed, fresh memory is NaN."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_OFFLINE="1")

from jaxtyping import install_import_hook

install_import_hook("rung", "beartype.beartype")

import socket

import pytest
import torch
from hypothesis import HealthCheck, settings

# a busy machine is no wrong answer
settings.register_profile("rung", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rung")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

_connect = socket.socket.connect


def _connect_to_this_machine_only(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"tests have no network; something asked for {address}")
    return _connect(self, address)


@pytest.fixture(autouse=True)
def closed_sockets(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _connect_to_this_machine_only)


@pytest.fixture(scope="session")
def smollm2_folder():
    """The packaged model as a Hugging Face folder.  Skips where it cannot be had, unless in CI."""
    from rung.core.errors import ModelError
    from rung.lm.weights.sources import locate

    try:
        return locate("smollm2-135m")
    except ModelError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))
