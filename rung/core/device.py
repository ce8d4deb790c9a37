"""The device that holds what is as wide as a model, by its name: cpu, cuda, cuda:1.

What is one number a token wide stays on the host, whatever the device (docs/guide/gpu.md).
"""

import os
from collections.abc import Callable, Mapping

import torch

from rung.core.errors import ConfigError

# cuBLAS may add up in another order from call to call unless its workspace is fixed before it is first used; PyTorch
# refuses its products in deterministic mode without this.  [NVIDIA, cuBLAS: results reproducibility]
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def device_named(name: str) -> torch.device:
    """What a name means, be it here or not.  Raises ConfigError for a name that means no device."""
    kind, colon, index = name.partition(":")
    if kind not in LACKS or (colon and not index.isdecimal()):
        raise ConfigError(f"there is no device {name!r}: needed cpu, cuda, or cuda:1 for the second of several GPUs.")
    return torch.device(name)


def lacks(device: torch.device) -> str:
    """What this machine lacks to compute on a device, and what to do; empty where it lacks nothing."""
    return LACKS[device.type](device)


def open_device(name: str) -> torch.device:
    """The device of this name, ready to repeat a computation bit for bit; a GPU becomes the process's current one.

    Raises ConfigError as `device_named` does, and for a device that this machine or this PyTorch lacks.
    """
    device = device_named(name)
    if device.type == "cuda":
        os.environ.setdefault(*CUBLAS_WORKSPACE)
    if lacking := lacks(device):
        raise ConfigError(lacking)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # compiled kernels and captured graphs run on the current one
    return device


def idle_gpu(device: torch.device) -> str:
    """A sentence for who computes on the CPU beside a GPU; else empty."""
    if device.type != "cpu" or not torch.cuda.is_available():
        return ""
    return "PyTorch sees a GPU here, and the model is on the CPU: --device cuda moves it"


def _cuda_lacks(device: torch.device) -> str:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if (device.index or 0) < count:
            return ""
        return f"there is no {device}: PyTorch sees {count} GPU{'s' * (count > 1)}, counted from cuda:0."
    if not torch.backends.cuda.is_built():
        reason = "is a build without CUDA: install one with it (docs/guide/install.md)"
    else:
        reason = "sees no GPU: `nvidia-smi` must list it, and CUDA_VISIBLE_DEVICES must not hide it"
    return f"device {device} needs CUDA, and this PyTorch ({torch.__version__}) {reason}. The device cpu needs neither."


LACKS: Mapping[str, Callable[[torch.device], str]] = {"cpu": lambda device: "", "cuda": _cuda_lacks}
