"""A device is named, found, or refused with what is lacking; nothing here has a GPU, so what torch says is replaced."""

import os

import pytest
import torch

from rung.core.device import CUBLAS_WORKSPACE, device_named, idle_gpu, lacks, open_device
from rung.core.environment import environment
from rung.core.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes torch say that there are so many GPUs; the devices that were made current."""
    current: list[torch.device] = []
    monkeypatch.delenv(CUBLAS_WORKSPACE[0], raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {torch.device(device)}")

    def there_are(number: int, *, built: bool = True) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        return current

    return there_are


@pytest.mark.parametrize(
    "name", ["gpu", "cdua", "cuda:", "cuda:-1", "cuda:one", "cuda 1", "", "mps", "meta", "cuda:1:2"]
)
def test_a_name_that_means_no_device_is_refused_with_those_that_do(name):
    with pytest.raises(ConfigError, match=r"no device '.*': needed cpu, cuda, or cuda:1"):
        device_named(name)


def test_a_device_that_is_not_here_has_a_meaning_and_cannot_be_opened(gpus):
    gpus(0, built=False)
    assert device_named("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"needs CUDA, and this PyTorch .* is a build without CUDA: install one"):
        open_device("cuda")
    gpus(0)
    with pytest.raises(ConfigError, match=r"sees no GPU: `nvidia-smi` must list it, and CUDA_VISIBLE_DEVICES"):
        open_device("cuda:1")
    gpus(2)
    with pytest.raises(ConfigError, match=r"there is no cuda:2: PyTorch sees 2 GPUs, counted from cuda:0"):
        open_device("cuda:2")
    assert lacks(torch.device("cuda:1")) == lacks(torch.device("cpu")) == ""


def test_an_opened_gpu_is_the_current_one_and_cublas_adds_up_in_one_order(gpus):
    current = gpus(2)
    assert open_device("cpu") == torch.device("cpu")
    assert CUBLAS_WORKSPACE[0] not in os.environ
    assert open_device("cuda") == torch.device("cuda")  # whichever is current stays so
    assert open_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    assert os.environ[CUBLAS_WORKSPACE[0]] == ":4096:8"


def test_a_workspace_that_somebody_chose_is_left(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv(CUBLAS_WORKSPACE[0], ":16:8")
    open_device("cuda")
    assert os.environ[CUBLAS_WORKSPACE[0]] == ":16:8"


def test_who_computes_beside_a_gpu_is_told_and_nobody_else(gpus):
    gpus(1)
    assert "--device cuda" in idle_gpu(torch.device("cpu"))
    assert idle_gpu(torch.device("cuda")) == ""
    gpus(0)
    assert idle_gpu(torch.device("cpu")) == ""


def test_the_environment_names_the_gpu_that_computes(gpus):
    """Resuming compares this name: a run of cuda:1 is not one of another card that happens to be the first."""
    gpus(2)
    assert environment("cuda:1")["gpu"] == "GPU cuda:1"
    assert environment("cuda")["gpu"] == environment("cpu")["gpu"] == "GPU cuda"
    gpus(0)
    assert environment("cpu")["gpu"] == ""
