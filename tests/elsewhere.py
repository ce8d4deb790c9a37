"""A second device, simulated: what is made on it computes on the CPU, with real values, and cannot meet host tensors.

    with elsewhere() as traffic:
        x = torch.ones(3, device=DEVICE)
        x + torch.ones(3)            # raises RuntimeError, as on a machine with two devices
        x.tolist()                   # traffic.down == 1: a host that waits for its device

So code for a GPU runs in ordinary tests: what crosses between host and device, how often, and with which results (the
CPU's, but for the order of some sums: PyTorch composes a few operations differently for other devices).  What it
cannot show: kernels, streams, graphs, speed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Unseen(torch._C._acc.PrivateUse1Hooks):
    """To everybody else in the process there is no such device: nobody seeds it, moves to it or counts it."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, dev_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


_MODULE = SimpleNamespace(
    is_available=lambda: False,
    is_initialized=lambda: True,
    device_count=lambda: 0,
    current_device=lambda: 0,
    manual_seed_all=lambda seed: None,
    _is_in_bad_fork=lambda: False,
    get_amp_supported_dtype=list,  # recomputation asks, and no AMP is on
)
_setup_privateuseone_for_python_backend("elsewhere", backend_module=_MODULE, hook=_Unseen())
DEVICE = torch.device("elsewhere", 0)
WHOLE = torch.library.Library("aten", "IMPL")  # what devices have a kernel for, and PyTorch would else cut up for this
for name in ("silu_backward", "linalg_vecdot"):
    WHOLE.impl(name, lambda *_: None, "PrivateUse1")  # never called: dispatch sees the operation before
aten = torch.ops.aten
CROSSINGS = {aten._to_copy.default, aten.copy_.default}
MOVES = {getattr(aten.to, name) for name in aten.to.overloads()}  # in inference mode not yet taken apart
TAKES_HOST_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
WAITS |= {aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default}


@dataclass
class Traffic:
    """Tensors that went up to the device and down from it; down counts every reason for the host to wait.

    host_indices: uploads hidden in an indexing by host tensors
    """

    up: int = 0
    down: int = 0
    host_indices: int = 0


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on the device; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), None, inner.dtype, inner.layout, DEVICE
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = self.detach().clone()
        copied = torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy
        memo[id(self)] = copied
        return copied

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        assert isinstance(value, Elsewhere), "parameter.data of the device can only become a tensor of the device"
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {}, Traffic())


class _Device(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in MOVES:
            with self:
                return function.decompose(*args, **(kwargs or {}))
        return _compute(function, args, kwargs or {}, self.traffic)


class _FromNumbers(TorchFunctionMode):
    """torch.tensor(numbers, device=...) passes dispatch by: it is made on the host here, and moved."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and (device := kwargs.pop("device", None)) is not None:
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args, kwargs = (
                args[:1],
                {"device": args[1].device, "dtype": args[1].dtype} | kwargs,
            )  # else unseen in inference
        if function is torch.asarray:  # safetensors' way from a file's bytes to a tensor; no mode of dispatch knows it
            with _disable_current_modes():
                return function(*args, **kwargs)
        return function(*args, **kwargs)


@contextmanager
def elsewhere() -> Iterator[Traffic]:
    """Within it tensors can be made on DEVICE."""
    traffic = Traffic()
    with _FromNumbers(), _Device(traffic):
        yield traffic


def _compute(function: Any, args: Any, kwargs: dict[str, Any], traffic: Traffic) -> Any:
    """Check who meets whom, compute on the values, and put the result where a device would have it."""
    given, _ = tree_flatten((args, kwargs))
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    wanted = kwargs.get("device")
    on_device = bool(there) if wanted is None else torch.device(wanted).type == DEVICE.type
    if function is aten.copy_.default:
        on_device = isinstance(args[0], Elsewhere)
    if there:
        _check(function, here, traffic)
        if function in WAITS or _by_a_mask(function, there):
            traffic.down += 1
    if function in CROSSINGS and tensors:
        traffic.up += on_device and bool(here)
        traffic.down += bool(there) and not on_device
    values, spec = tree_flatten((args, kwargs))
    inner_args, inner_kwargs = tree_unflatten([_inner(value) for value in values], spec)
    if function is aten.resize_.default and there:
        raise NotImplementedError("the simulated device cannot resize a tensor in place")
    out = function(*inner_args, **inner_kwargs)
    if not on_device:
        return return_and_correct_aliasing(function, args, kwargs, out) if here and not there else out
    wrapped = tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, out)
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if there else wrapped


def _inner(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == DEVICE.type else value


def _check(function: Any, here: list[torch.Tensor], traffic: Traffic) -> None:
    wide = [tensor for tensor in here if tensor.dim() > 0]
    if not wide or function in CROSSINGS:
        return
    if function in TAKES_HOST_INDICES and all(tensor.dtype in (torch.int64, torch.bool) for tensor in wide):
        traffic.host_indices += len(wide)
        return
    shapes = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in wide)
    raise RuntimeError(f"{function} got tensors of the device and of the host: {shapes}")


def _by_a_mask(function: Any, there: list[torch.Tensor]) -> bool:
    """An indexing whose result's size the host must first ask for."""
    return function in TAKES_HOST_INDICES and any(tensor.dtype == torch.bool for tensor in there[1:])
