"""Which estimator's gradient is which: the tables of docs/guide/kl.md, with objectives as a user would write them.

"one": one token of five, a bandit.  "three": three tokens of three, 27 sequences.  Groups of one, hence no baseline.
"""

import pytest
import torch
from worlds import FIXED

from rung import truth
from rung.core.records import Term
from rung.objectives.advantages import return_to_go
from rung.objectives.kl import k1, k2, k3
from rung.objectives.policy import clip, pg
from rung.objectives.reduce import segment_sum

EXACT, BIASED = 1e-10, 0.05
ONE = truth.World(vocabulary=5, max_tokens=1, prompts=((0,),))


class Setup:
    def __init__(self, world, seed):
        generator = torch.Generator().manual_seed(seed)
        self.policy, self.sampler, self.reference = (truth.TablePolicy.random(world, generator) for _ in range(3))
        self.values = {c: float(torch.randn((), generator=generator)) for c in world.completions()}

    def check(self, loss, *, on_policy, claim):
        """Verdict on a loss given as values per token or sequence, from samples of the policy or of the sampler."""
        old = self.policy if on_policy else self.sampler

        def objective(policy, batch):
            value = loss(Sampled(policy.scores(batch).logp_T, batch))
            mask = batch.trainable_T if len(value) == len(batch.tokens_T) else torch.ones(len(value), dtype=torch.bool)
            return {"loss": Term(value, mask, float(batch.counts.sequences))}

        return truth.check(
            objective,
            self.policy,
            reward=lambda prompt, completion: self.values[completion],
            streams=lambda group: group,
            group_size=1,
            claim=claim,
            policies=[("logp_old", old), ("logp_ref", self.reference)],
            sampler=old,
        )


class Sampled:
    """Log-probabilities of sampled tokens under three policies, and sums over sequences."""

    def __init__(self, logp_T, batch):
        self.logp_T, self.old_T, self.ref_T = logp_T, batch.streams["logp_old"], batch.streams["logp_ref"]
        self.batch = batch
        self.ratio_T = (logp_T - self.old_T).exp()

    def sum(self, value_T):
        return segment_sum(value_T, self.batch.sequence_T, len(self.batch.last_S))

    def to_go(self, value_T):
        return return_to_go(value_T, self.batch.sequence_T, self.batch.last_S)

    def ratio_S(self):
        return self.sum(self.logp_T - self.old_T).exp()


SETUPS = {"one": Setup(ONE, 1), "three": Setup(FIXED, 2)}
ON, OFF = "on", "off"
KL_LOSSES = {
    "k1": lambda x: k1(x.logp_T, x.ref_T),
    "k1 in the reward": lambda x: x.to_go(k1(x.old_T, x.ref_T)) * x.logp_T,
    "k2": lambda x: k2(x.logp_T, x.ref_T),
    "k2 of sequences": lambda x: k2(x.sum(x.logp_T), x.sum(x.ref_T)),
    "k2 of sequences x detached ratio": lambda x: x.ratio_S().detach() * k2(x.sum(x.logp_T), x.sum(x.ref_T)),
    "k3": lambda x: k3(x.logp_T, x.ref_T),
    "k3 in the reward": lambda x: x.to_go(k3(x.old_T, x.ref_T)) * x.logp_T,
    "ratio x k3": lambda x: x.ratio_T * k3(x.logp_T, x.ref_T),
    "detached ratio x k2": lambda x: x.ratio_T.detach() * k2(x.logp_T, x.ref_T),
    "ratio x k2": lambda x: x.ratio_T * k2(x.logp_T, x.ref_T),
}
EXACT_KL = [
    ("k1 in the reward", "one", ON),
    ("k1 in the reward", "three", ON),
    ("k2", "one", ON),
    ("k2 of sequences", "one", ON),
    ("k2 of sequences", "three", ON),
    ("k2 of sequences x detached ratio", "three", OFF),
    ("ratio x k3", "one", ON),
    ("ratio x k3", "one", OFF),
    ("detached ratio x k2", "one", ON),
    ("detached ratio x k2", "one", OFF),
]
BIASED_KL = [
    ("k2", "one", OFF),
    ("k2", "three", ON),
    ("k2 of sequences", "three", OFF),
    ("k3", "one", ON),
    ("k3", "one", OFF),
    ("k3", "three", ON),
    ("k3 in the reward", "one", ON),
    ("k3 in the reward", "three", ON),
    ("ratio x k3", "three", ON),
    ("ratio x k3", "three", OFF),
    ("detached ratio x k2", "three", ON),
    ("ratio x k2", "one", OFF),
]


def verdict_on_kl(name, setup, drawn):
    s = SETUPS[setup]
    return s.check(KL_LOSSES[name], on_policy=drawn == ON, claim=lambda p: truth.expected_kl(p, s.reference))


@pytest.mark.parametrize(("name", "setup", "drawn"), EXACT_KL)
def test_these_estimators_have_exactly_the_gradient_of_the_reverse_kl(name, setup, drawn):
    assert verdict_on_kl(name, setup, drawn).error < EXACT


@pytest.mark.parametrize(("name", "setup", "drawn"), BIASED_KL)
def test_these_estimators_point_elsewhere_than_the_reverse_kl(name, setup, drawn):
    verdict = verdict_on_kl(name, setup, drawn)
    assert verdict.error > BIASED
    assert verdict.direction > BIASED


def test_k1_as_a_loss_has_no_gradient_at_all():
    for setup in SETUPS:
        verdict = verdict_on_kl("k1", setup, ON)
        assert float(verdict.expected_NV.abs().max()) < 1e-15
        assert verdict.error == pytest.approx(1.0)


def test_k3_as_a_loss_is_the_forward_kl_of_one_token():
    s = SETUPS["one"]
    verdict = s.check(KL_LOSSES["k3"], on_policy=True, claim=lambda p: forward_kl(s.reference, p))
    assert verdict.error < EXACT


def test_k3_in_the_reward_descends_the_reverse_minus_the_forward_kl_of_one_token():
    s = SETUPS["one"]
    verdict = s.check(
        KL_LOSSES["k3 in the reward"],
        on_policy=True,
        claim=lambda p: truth.expected_kl(p, s.reference) - forward_kl(s.reference, p),
    )
    assert verdict.error < EXACT


def forward_kl(reference, policy):
    """KL(reference || policy), differentiable in the policy."""
    pairs = zip(reference.logps((0,)), policy.logps((0,)), strict=True)
    return sum(q.sum().exp() * (q.sum() - p.sum()) for q, p in pairs)


def geometric(x):
    """The ratio of GSPO: the geometric mean over a sequence's tokens.  [Zheng 2025]"""
    return (x.sum(x.logp_T - x.old_T) / x.sum(x.batch.trainable_T.double())).exp()


def prefix_ratio_T(x):
    log_ratio_T = x.logp_T - x.old_T
    return (x.sum(log_ratio_T)[x.batch.sequence_T] - x.to_go(log_ratio_T) + log_ratio_T).exp()


def reinforce(ratio_T):
    """-ratio R log pi with the ratio detached: the score-function form of a weighted sample."""
    return lambda x, reward_T: -pg(x.logp_T, x.old_T, ratio_T(x).detach() * reward_T)


RETURN_LOSSES = {
    "no correction": reinforce(lambda x: torch.ones_like(x.logp_T)),
    "token ratio": lambda x, reward_T: -clip(x.logp_T, x.old_T, reward_T, eps_low=1e9, eps_high=1e9),
    "prefix product": reinforce(prefix_ratio_T),
    "sequence product": reinforce(lambda x: x.ratio_S()[x.batch.sequence_T]),
    "sequence product up to 2": reinforce(lambda x: x.ratio_S().clamp(max=2)[x.batch.sequence_T]),
    "token ratio up to 2": reinforce(lambda x: x.ratio_T.clamp(max=2)),
    "geometric mean": lambda x, reward_T: -geometric(x) * reward_T[x.batch.last_S],
}


def verdict_on_return(name, drawn):
    s = SETUPS["three"]

    def loss(x):
        sequences = x.batch.tokens_T[x.batch.trainable_T].view(-1, 3).tolist()
        reward_T = torch.tensor([s.values[tuple(c)] for c in sequences], dtype=torch.float64)[x.batch.sequence_T]
        return RETURN_LOSSES[name](x, reward_T)

    def claim(policy):
        return -truth.expected_return(policy, lambda prompt, completion: s.values[completion])

    return s.check(loss, on_policy=drawn == ON, claim=claim)


@pytest.mark.parametrize("name", RETURN_LOSSES)
def test_from_another_policys_samples_only_the_product_over_the_sequence_is_unbiased(name):
    verdict = verdict_on_return(name, OFF)
    if name == "sequence product":
        assert verdict.error < EXACT
    else:
        assert verdict.direction > BIASED


@pytest.mark.parametrize("name", [name for name in RETURN_LOSSES if name != "geometric mean"])
def test_on_policy_every_correction_is_the_plain_policy_gradient(name):
    assert verdict_on_return(name, ON).error < EXACT


def test_the_geometric_mean_divides_by_the_length_even_on_policy():
    assert verdict_on_return("geometric mean", ON).scale == pytest.approx(1 / 3)


if __name__ == "__main__":  # the table of docs/guide/kl.md
    for name in KL_LOSSES:
        row = [f"{verdict_on_kl(name, s, d).error:.3f}" for s in SETUPS for d in (ON, OFF)]
        print(f"| {name} | {' | '.join(row)} |")
    for name in RETURN_LOSSES:
        print(f"| {name} | {verdict_on_return(name, OFF).error:.3f} |")
