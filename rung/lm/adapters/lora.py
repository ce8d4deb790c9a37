"""LoRA: the weights rest, and a product of two thin matrices learns beside each of them.  [Hu 2021]

    y = W x + scaling B A x        A [rank, D],  B [E, rank],  scaling as `spec.LoRA` says

A begins uniform in +-1/sqrt(D) (Kaiming's rule with slope sqrt(5), as in PEFT), B at zero: an adapter that has learnt
nothing is the base, bit for bit.  The layers are left as they are: a forward hook adds the product to what a layer
gives, be it ours or torch's, and switched off it adds nothing.  So one decoder is policy and reference of a run.

Our layers are joined where PEFT's are apart (`qkv` is q_proj, k_proj, v_proj): a layer has a product for each of its
adapted parts.  Their A's are one matrix [P rank, D], so that x is read once; their B's lie below each other [F, rank].
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from rung.core.errors import ConfigError, ModelError, nearest
from rung.core.keys import derive_key, signed
from rung.core.records import Layout
from rung.core.rng import uniforms
from rung.core.shapes import Float, Int, Tensor
from rung.lm import protocols
from rung.lm.adapters.spec import ALL, LoRA
from rung.lm.decoder import Decoder
from rung.lm.linear import Linear
from rung.lm.weights.names import HUGGING_FACE, rules

WEIGHT = ".weight"
Span = tuple[int, int]  # rows of a layer's output: first, one behind the last


@dataclass(frozen=True, eq=False)
class Site:
    """A layer that can have adapters: our name for it, and PEFT's name -> rows of its output for each part."""

    ours: str
    layer: nn.Module
    parts: Mapping[str, Span]

    @property
    def weight(self) -> Tensor:
        return self.layer.get_parameter("weight")


def native_sites(decoder: Decoder, names: Mapping[str, str] = HUGGING_FACE) -> tuple[Site, ...]:
    """Our linear layers but the head; `names` is the table their parts are called by."""
    layers = {name: layer for name, layer in decoder.named_modules() if isinstance(layer, Linear)}
    sites = []
    for rule in rules(decoder.config, names):
        ours = rule.ours.removesuffix(WEIGHT)
        if ours in layers and rule.ours.endswith(WEIGHT) and layers[ours] is not decoder.unembedding:
            stops = list(accumulate(part.shape[0] for part in rule.parts))
            spans = zip([0, *stops], stops, strict=False)
            parts = {part.name.removesuffix(WEIGHT): span for part, span in zip(rule.parts, spans, strict=True)}
            sites.append(Site(ours, layers[ours], parts))
    return tuple(sites)


def linear_sites(model: nn.Module, head: nn.Module | None) -> tuple[Site, ...]:
    """torch's linear layers of a model but its head, under their own names."""
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    return tuple(Site(name, layer, {name: (0, layer.out_features)}) for name, layer in layers.items())


def chosen(sites: Sequence[Site], spec: LoRA) -> tuple[Site, ...]:
    """The sites, with the parts, that the targets name.  Raises ConfigError for a target that names none."""
    last = {name: name.rpartition(".")[2] for site in sites for name in site.parts}
    wanted = set(last.values()) if spec.targets == ALL else {t.strip() for t in spec.targets.split(",")}
    if unknown := sorted(wanted - set(last.values())):
        raise ConfigError(
            f"lora.targets names {unknown[0]!r}, and the model has no such linear layer. "
            f"{nearest(unknown[0], {ALL, *last.values()})}"
        )
    kept = [
        Site(site.ours, site.layer, {name: rows for name, rows in site.parts.items() if last[name] in wanted})
        for site in sites
    ]
    if not (kept := [site for site in kept if site.parts]):
        raise ConfigError("the model has no linear layer that LoRA could stand beside.")
    return tuple(kept)


def num_weights(sites: Sequence[Site], spec: LoRA) -> int:
    """Weights of an adapter on these (chosen) sites."""
    inputs = sum(len(site.parts) * site.weight.shape[1] for site in sites)
    return spec.rank * (inputs + sum(stop - start for site in sites for start, stop in site.parts.values()))


@dataclass(frozen=True, eq=False)
class Factors:
    """An adapter as values: A [rank, D] and B [E, rank] of every adapted layer, by PEFT's name for the layer."""

    spec: LoRA
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """W + scaling B A of the tensor `name`, in fp32 at least; one without an adapter as it is."""
        if name.removesuffix(WEIGHT) not in self.pairs or not name.endswith(WEIGHT):
            return weight
        a_RD, b_ER = (factor.detach() for factor in self.pairs[name.removesuffix(WEIGHT)])
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide).addmm(b_ER.to(wide), a_RD.to(wide), alpha=self.spec.scaling)

    def check(self, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
        """Raises ModelError where a model whose tensors have these shapes is not the one that was adapted."""
        for name, (a_RD, b_ER) in self.pairs.items():
            if name + WEIGHT not in shapes:
                raise ModelError(
                    f"{where} adapts {name!r}, and its base has no tensor {name + WEIGHT!r}: give the model that was "
                    f"adapted. {nearest(name + WEIGHT, shapes)}"
                )
            found, needed = tuple(shapes[name + WEIGHT]), (b_ER.shape[0], a_RD.shape[1])
            if found != needed:
                raise ModelError(
                    f"{where} adapts {name!r} of shape {list(needed)}, and its base has {list(found)} there: give the "
                    "model that was adapted."
                )


class Adapter:
    """Learns beside a decoder, whose own parameters it freezes.

    parameters: our name + `.lora_A` or `.lora_B` -> matrix; not the decoder's, whose names and files stay what they are
    """

    def __init__(
        self, decoder: nn.Module, sites: Sequence[Site], spec: LoRA, *, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """Draws A from keys of (seed, PEFT's name): the same numbers wherever the layer is joined to others."""
        if not spec.on:
            raise ConfigError(f"an adapter needs lora.rank of at least 1; got {spec.rank}.")
        self.spec, self.sites, self.on = spec, chosen(sites, spec), True
        self.parameters: dict[str, nn.Parameter] = {}
        decoder.requires_grad_(False)
        for site in self.sites:
            device, width = site.weight.device, site.weight.shape[1]
            a_RD = torch.cat([_drawn(seed, name, spec.rank, width) for name in site.parts])
            b_FR = torch.zeros(sum(stop - start for start, stop in site.parts.values()), spec.rank)
            factors = [nn.Parameter(factor.to(device, dtype)) for factor in (a_RD, b_FR)]
            self.parameters |= dict(zip(_names(site), factors, strict=True))
            site.layer.register_forward_hook(self._hook(site, *factors))

    @contextmanager
    def off(self) -> Iterator[None]:
        """The decoder as it was without the adapter."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def factors(self, weights: Mapping[str, Tensor] | None = None) -> Factors:
        """The adapter by PEFT's names, as views; `weights` take the place of the parameters (fp32 masters, say)."""
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for site in self.sites:
            a_RD, b_FR = (dict(weights or self.parameters)[name].detach() for name in _names(site))
            sizes = [stop - start for start, stop in site.parts.values()]
            pairs |= dict(zip(site.parts, zip(a_RD.split(self.spec.rank), b_FR.split(sizes), strict=True), strict=True))
        return Factors(self.spec, pairs)

    def _hook(self, site: Site, a_RD: nn.Parameter, b_FR: nn.Parameter) -> Any:
        spans, scaling = tuple(site.parts.values()), self.spec.scaling

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if not self.on:
                return y
            if torch.is_grad_enabled():
                return _LowRank.apply(y, inputs[0], a_RD, b_FR, spans, scaling)
            _add_(y.view(-1, y.shape[-1]), _rows(inputs[0]) @ a_RD.T, b_FR, spans, scaling)
            return y

        return add


class BaseDecoder:
    """A decoder with its adapter off: the reference policy of a run, without a weight of its own.

    Meets `protocols.Decoder`."""

    def __init__(self, decoder: protocols.Decoder, adapter: Adapter) -> None:
        self._decoder, self._adapter = decoder, adapter
        self.branches, self.logit_softcap = decoder.branches, decoder.logit_softcap

    def forward(self, tokens_T: Int[Tensor, "T"], layout: Layout, state: Any = None) -> Float[Tensor, "T D"]:
        with self._adapter.off():
            return self._decoder.forward(tokens_T, layout, state)

    def head(self, hidden_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        return self._decoder.head(hidden_ND)

    def head_weight(self) -> Float[Tensor, "V D"]:
        return self._decoder.head_weight()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._decoder.parameters()

    def new_state(self, slots: int, capacity: int) -> protocols.State:
        return self._decoder.new_state(slots, capacity)


class _LowRank(torch.autograd.Function):
    """y += scaling B_p A_p x on the rows of each part p, in place.  Keeps x and A x for the backward pass, where
    autograd would keep a copy of y's gradient for every part too.

    With g the gradient of y, s the scaling:  dB_p = s g_p (A_p x)',  dA_p = s B_p' g_p x',  dx = sum of s A_p' B_p' g_p
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a_RD: Tensor, b_FR: Tensor, spans: tuple, scaling: float) -> Tensor:
        h_NR = _rows(x) @ a_RD.T
        _add_(y.view(-1, y.shape[-1]), h_NR, b_FR, spans, scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, a_RD, b_FR, h_NR)
        ctx.spans, ctx.scaling = spans, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a_RD, b_FR, h_NR = ctx.saved_tensors
        dy_NE, dh_NR, db_FR = _rows(dy), torch.empty_like(h_NR), torch.empty_like(b_FR)
        for rows, below, ranks in _cuts(ctx.spans, b_FR.shape[1]):
            torch.mm(dy_NE[:, rows], b_FR[below], out=dh_NR[:, ranks])
            torch.mm(dy_NE[:, rows].T, h_NR[:, ranks], out=db_FR[below])
        dh_NR.mul_(ctx.scaling)
        dx = (dh_NR @ a_RD).view_as(x) if ctx.needs_input_grad[1] else None
        return dy, dx, dh_NR.T @ _rows(x), db_FR.mul_(ctx.scaling), None, None


def _add_(y_NE: Tensor, h_NR: Tensor, b_FR: Tensor, spans: Sequence[Span], scaling: float) -> None:
    for rows, below, ranks in _cuts(spans, b_FR.shape[1]):
        y_NE[:, rows].addmm_(h_NR[:, ranks], b_FR[below].T, alpha=scaling)


def _cuts(spans: Sequence[Span], rank: int) -> Iterator[tuple[slice, slice, slice]]:
    """Of each part: its rows of the output, its rows of B, its columns of A x."""
    below = 0
    for number, (start, stop) in enumerate(spans):
        yield slice(start, stop), slice(below, below + stop - start), slice(number * rank, (number + 1) * rank)
        below += stop - start


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _drawn(seed: int, name: str, rank: int, width: int) -> Tensor:
    """A [rank, D], uniform in +-1/sqrt(D), from the key (seed, "lora", name) at positions 0 ... rank - 1."""
    key_R = torch.full((rank,), signed(derive_key(seed, "lora", name)))
    return (2 * uniforms(key_R, torch.arange(rank), torch.arange(width)) - 1) / width**0.5


def _names(site: Site) -> tuple[str, str]:
    return f"{site.ours}.lora_A", f"{site.ours}.lora_B"
