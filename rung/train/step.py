"""One optimiser step, for every method.

Parameters of the decoder are the compute copy: the module that samples is the module that learns.  Where they are bf16,
fp32 masters live here; a hook moves each gradient into fp32 as soon as it is complete, AdamW updates the masters, and
the result is rounded back in place, so that an engine's references stay valid.  fp32 parameters are their own masters.

Denominators come with the batches and are those of the whole step, so that the loss is a plain sum over micro-batches.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rung.core.errors import NonFiniteError
from rung.core.records import Objective, PackedBatch, Term, TokenScores
from rung.core.shapes import Tensor
from rung.objectives.reduce import total_loss
from rung.train.config import Optim
from rung.train.policy import LanguagePolicy, Recorded

REFUSED = (
    "The step was refused and nothing was changed; resumed, the run would come to the same step and stop again. Start "
    "another one from its config.json with a lower optim.lr or optim.grad_clip, or with dtype fp32"
)

Observer = Callable[[PackedBatch, TokenScores], None]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """loss by term (of the whole step), the gradient's norm before clipping, and the learning rate used."""

    loss: float
    terms: Mapping[str, float]
    grad_norm: float
    lr: float


class Learner:
    """Owns masters and optimiser of one decoder's parameters."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], optim: Optim, *, num_steps: int, dtype: torch.dtype
    ) -> None:
        """Takes fp32 (or fp64) parameters.  Where `dtype` is another, they become the masters, and the module is left
        with a rounded copy of them."""
        self.optim, self.num_steps, self.num_updates = optim, num_steps, 0
        self.compute = dict(parameters)
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.compute.items():
            self.masters[name] = parameter
            if parameter.dtype != dtype:
                self.masters[name] = parameter.detach()
                parameter.data = parameter.detach().to(dtype)
        self._grads: dict[str, Tensor] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._accumulate(name)) for name, p in self.compute.items()]
        decayed = [m for m in self.masters.values() if m.ndim > 1]
        others = [m for m in self.masters.values() if m.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )

    def load_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Set the masters in place (from a checkpoint, or from weights of higher precision than the compute copy)."""
        for name, master in self.masters.items():
            master.data.copy_(masters[name])
        self._round()

    def step(
        self,
        batches: Sequence[PackedBatch],
        policy: LanguagePolicy,
        objective: Objective,
        observe: Observer = lambda batch, scores: None,
        phase: Callable[[str], None] = lambda name: None,
    ) -> StepResult:
        """Forward and backward over all micro-batches, clip, AdamW.  `observe` sees every batch with its scores.

        `phase` is told when "backward" and "update" begin.
        No batch at all (every group of the step is dead) is a step with a gradient of zero.
        Raises NonFiniteError, with nothing changed, if a loss or gradient is not finite.
        """
        totals: dict[str, float] = {}
        recorded = Recorded(policy)
        try:
            phase("backward")
            for batch in batches:
                terms = objective(recorded, batch)
                loss, values = total_loss(terms)
                _refuse_non_finite_loss(values, terms, recorded.last)
                loss.backward()
                if recorded.last is not None:
                    observe(batch, recorded.last)
                for name, value in values.items():
                    totals[name] = totals.get(name, 0.0) + value
            norm = self._clip()
            phase("update")
            lr = self._update()
        finally:
            self._grads.clear()
        return StepResult(loss=math.fsum(totals.values()), terms=totals, grad_norm=norm, lr=lr)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint by file: masters, and AdamW's two moments."""
        files: dict[str, dict[str, Tensor]] = {"masters": {}, "adam_m": {}, "adam_v": {}}
        for name, master in self.masters.items():
            files["masters"][name] = master.detach()
            moments = self.adamw.state.get(master)
            if moments:
                files["adam_m"][name], files["adam_v"][name] = moments["exp_avg"], moments["exp_avg_sq"]
        return files

    def restore(self, files: Mapping[str, Mapping[str, Tensor]], *, num_updates: int) -> None:
        """Continue exactly where `state()` was taken."""
        self.load_masters(files["masters"])
        self.num_updates = num_updates
        self.adamw.state.clear()
        for name, first in files["adam_m"].items():
            master = self.masters[name]
            self.adamw.state[master] = {
                "step": torch.tensor(float(num_updates), device=master.device),
                "exp_avg": first.to(master.device, copy=True),
                "exp_avg_sq": files["adam_v"][name].to(master.device, copy=True),
            }

    def learning_rate(self, update: int) -> float:
        """The rate of update number `update` (from 0): linear warm-up, then the schedule down to zero at num_steps."""
        if update < self.optim.warmup:
            return self.optim.lr * (update + 1) / self.optim.warmup
        left = max(self.num_steps - update, 0) / max(self.num_steps - self.optim.warmup, 1)
        return self.optim.lr * SCHEDULES[self.optim.schedule](left)

    def _accumulate(self, name: str) -> Callable[[torch.nn.Parameter], None]:
        def hook(parameter: torch.nn.Parameter) -> None:
            grad, parameter.grad = parameter.grad, None
            assert grad is not None, "the hook runs after a gradient was accumulated"
            master = self.masters[name]
            if name in self._grads:
                self._grads[name].add_(grad)
            else:
                self._grads[name] = grad.to(master.dtype)

        return hook

    def _clip(self) -> float:
        """Scale gradients to the norm allowed; returns the norm before.  Refuses what is not finite."""
        norm = float(torch.nn.utils.get_total_norm(list(self._grads.values())))
        if not math.isfinite(norm):
            bad = next((n for n, g in self._grads.items() if not bool(g.isfinite().all())), "(the norm overflowed)")
            raise NonFiniteError(f"The gradient of {bad!r} is not finite. {REFUSED}")
        if norm > self.optim.grad_clip:
            torch._foreach_mul_(list(self._grads.values()), self.optim.grad_clip / (norm + 1e-6))
        return norm

    def _update(self) -> float:
        lr = self.learning_rate(self.num_updates)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for name, master in self.masters.items():
            master.grad = self._grads[name] if name in self._grads else torch.zeros_like(master)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.num_updates += 1
        self._round()
        return lr

    def _round(self) -> None:
        with torch.no_grad():
            for name, parameter in self.compute.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda left: 1.0,
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
}


def _refuse_non_finite_loss(values: Mapping[str, float], terms: Mapping[str, Term], scores: TokenScores | None) -> None:
    """Name the first tensor that is not finite, from the scores onwards."""
    if all(math.isfinite(v) for v in values.values()):
        return
    bad = next((name for name, t in _tensors(scores, terms) if not bool(t.isfinite().all())), "the sum of the loss")
    raise NonFiniteError(f"The loss is not finite: the first bad tensor is {bad}. {REFUSED}")


def _tensors(scores: TokenScores | None, terms: Mapping[str, Term]) -> Iterator[tuple[str, Tensor]]:
    if scores is not None:
        yield "logp (log-probabilities of the policy)", scores.logp_T
        yield "entropy", scores.entropy_T
    for name, term in terms.items():
        yield f"term {name!r}", term.value[term.mask]
