"""What a run ran on: a resumed run repeats itself bit for bit only where these are equal.

A run folder is shown to others.  So this is a list of what goes in, and not of what stays out: versions, and what the
machine computes with.  No environment variable, no name of a user or a host, no path, no address.
"""

import hashlib
import platform
from importlib.metadata import version
from typing import Any

import torch

from rung import __version__
from rung.core.rng import NOISE_LAW

# Beside torch, tokens depend on what compiles our kernels, and on what makes ids of a conversation.
LIBRARIES = ("numba", "llvmlite", "tokenizers", "jinja2")
MAX_FACT = 200  # characters of a fact: a name or a version is short


def environment(device: str = "cpu") -> dict[str, Any]:
    """Names and numbers of this machine and process, as they go into `environment.json`: exactly these.

    device: the one that computes; where that is none of several GPUs, the first of them is named
    """
    facts = {
        "rung": __version__,
        "noise_law": NOISE_LAW,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_build": hashlib.blake2b(torch.__config__.show().encode(), digest_size=8).hexdigest(),
        **{name: version(name) for name in LIBRARIES},
        "cpu": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu(device),
    }
    return {name: value[:MAX_FACT] if isinstance(value, str) else value for name, value in facts.items()}


def _gpu(device: str) -> str:
    if not torch.cuda.is_available():
        return ""
    return torch.cuda.get_device_name(device if device.startswith("cuda") else "cuda")


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.machine()
