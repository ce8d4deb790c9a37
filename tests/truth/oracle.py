"""The formulas of docs/guide/methods.md and kl.md once more, in plain NumPy: it imports neither torch nor rung.

A policy is a dict from prefix to logits.  An expected gradient is a sum over all groups of probability x coefficient,
collected per (completion, token): the coefficient of grad log pi(token), c_it in the guide.
"""

import itertools

import numpy as np

STD_EPS = 1e-4


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class Oracle:
    """One prompt's completions, with the log-probabilities of a policy, a sampler and a reference."""

    def __init__(self, prompt, completions, policy, sampler, reference, max_tokens):
        self.prompt, self.completions, self.max_tokens = prompt, completions, max_tokens
        self.rows = {prefix: row for row, prefix in enumerate(policy)}
        self.vocabulary = len(next(iter(policy.values())))
        self.policy = policy
        self.logp, self.logp_old, self.logp_ref = (
            [self._logps(table, c) for c in completions] for table in (policy, sampler, reference)
        )
        self.chance = np.array([np.exp(sum(logps)) for logps in self.logp_old])

    def _logps(self, table, completion):
        return [np.log(softmax(table[(*self.prompt, *completion[:t])])[token]) for t, token in enumerate(completion)]

    def score(self, completion, t):
        """grad log pi(token t), as (row of the table, vector)."""
        prefix = (*self.prompt, *completion[:t])
        return self.rows[prefix], np.eye(self.vocabulary)[completion[t]] - softmax(self.policy[prefix])

    def gradient_of(self, coefficients):
        """Sum over completions and tokens of coefficient x grad log pi."""
        total = np.zeros((len(self.rows), self.vocabulary))
        for completion, row_of_coefficients in zip(self.completions, coefficients, strict=True):
            for t, c in enumerate(row_of_coefficients):
                row, vector = self.score(completion, t)
                total[row] += c * vector
        return total

    def entropy_gradient_of(self, coefficients):
        """Sum over completions and tokens of coefficient x grad H(prefix): -p (log p + H)."""
        total = np.zeros((len(self.rows), self.vocabulary))
        for completion, row_of_coefficients in zip(self.completions, coefficients, strict=True):
            for t, c in enumerate(row_of_coefficients):
                prefix = (*self.prompt, *completion[:t])
                p = softmax(self.policy[prefix])
                total[self.rows[prefix]] += c * -p * (np.log(p) - (p * np.log(p)).sum())
        return total

    def return_gradient(self, value):
        """grad of sum_y pi(y) value(y), the samples being the policy's own."""
        return self.gradient_of(
            [[p * v] * len(c) for p, v, c in zip(self.chance, value, self.completions, strict=True)]
        )

    def kl_gradient(self):
        """grad KL(pi || reference) of whole completions: sum_y pi(y) log-ratio(y) grad log pi(y)."""
        return self.return_gradient([sum(a) - sum(b) for a, b in zip(self.logp, self.logp_ref, strict=True)])

    def visits(self):
        """Probability that each prefix is reached."""
        chance = {}
        for p, completion in zip(self.chance, self.completions, strict=True):
            for t in range(len(completion)):
                prefix = (*self.prompt, *completion[:t])
                chance[prefix] = chance.get(prefix, 0.0) + p
        return chance

    def expected_gradient(self, m, reward, group_size, accept=lambda rewards: True):
        """E[gradient of the loss] of method `m` (a dict of a Method's fields), over all groups that `accept` keeps."""
        n = len(self.completions)
        collected = [np.zeros(len(c)) for c in self.completions]
        entropies = [np.zeros(len(c)) for c in self.completions]
        accepted = 0.0
        for group in itertools.product(range(n), repeat=group_size):
            rewards = [reward[i] for i in group]
            if not accept(rewards):
                continue
            chance = np.prod([self.chance[i] for i in group])
            accepted += chance
            tokens = sum(len(self.completions[i]) for i in group)
            advantages = advantages_of(m, np.array(rewards), [len(self.completions[i]) for i in group], self.max_tokens)
            for i, advantage in zip(group, advantages, strict=True):
                collected[i] += chance * self.coefficients(m, i, advantage, tokens, group_size)
                entropies[i] -= chance * m["entropy_coef"] / tokens
        return (self.gradient_of(collected) + self.entropy_gradient_of(entropies)) / accepted

    def coefficients(self, m, i, advantage, group_tokens, group_size):
        """c_t of one sample of a step that is one group: see the table in docs/guide/methods.md."""
        length = len(self.completions[i])
        logp, old, ref = (np.array(x[i]) for x in (self.logp, self.logp_old, self.logp_ref))
        share = {
            "sequence_mean": 1 / length / group_size,
            "tokens": 1 / group_tokens,
            "group_tokens": 1 / group_tokens,
            "constant": 1 / self.max_tokens / group_size,
            "sequences": 1 / group_size,
        }[m["denominator"]]
        advantage = np.full(length, advantage)
        if m["kl"] == "k1_reward":
            advantage = advantage - m["kl_coef"] * np.array([(old - ref)[t:].sum() for t in range(length)])
        if m["surrogate"] == "pg":
            c = -share * advantage
        elif m["surrogate"] == "clip":
            ratio = np.exp(logp - old)
            c = -share * advantage * ratio * passes(ratio, advantage, m)
        else:
            ratio = np.exp((logp - old).sum())
            c = -share * np.full(length, advantage[0] * ratio * passes(ratio, advantage[0], m))
        if m["kl"] == "k3_loss":
            c = c + m["kl_coef"] * share * (1 - np.exp(ref - logp))
        if m["kl"] == "square":
            c = c + m["kl_coef"] * (logp - ref).sum() / group_size
        return c


def passes(ratio, advantage, m):
    """Where the minimum of the clipped surrogate is its unclipped branch."""
    return np.where(advantage >= 0, ratio <= 1 + m["eps_high"], ratio >= 1 - m["eps_low"])


def advantages_of(m, rewards, lengths, max_tokens):
    if m["overlong"] == "shape":
        cache = m["overlong_cache"]
        start = max_tokens - cache
        rewards = rewards + np.array([0.0 if n <= start else (start - n) / cache for n in lengths])
    count = len(rewards)
    if m["advantage"] == "none":
        return rewards
    if m["advantage"] == "leave_one_out":
        return np.array([rewards[i] - np.delete(rewards, i).mean() for i in range(count)])
    centred = rewards - rewards.mean()
    return centred if m["advantage"] == "mean" else centred / (rewards.std(ddof=1) + STD_EPS)
