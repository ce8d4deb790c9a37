"""Drawing tokens: two-level Gumbel-max, exact, with noise that is a pure function of (key, position, block or token).

The vocabulary is cut into blocks of 256.  With z the logits after temperature and filters,

    block b* = argmax_b  lse_b + G(key, position, BLOCK_STREAM + b)        lse_b = log sum of exp(z_v) over block b
    token v* = argmax_v  z_v   + G(key, position, v)                       over the tokens of block b* only

where G is standard Gumbel noise (`rung.core.rng.gumbels`) and `position` is the absolute index of the token emitted.
Gumbel-max draws b with probability exp(lse_b - lse), then v with exp(z_v - lse_b); their product is softmax(z)_v, since
the two levels never share a noise word.  448 hashes a row replace 49 152, and there is no cumulative sum.
[Gumbel 1954; Maddison, Tarlow & Minka 2014]  Test vectors and proof: docs/guide/noise.md.

Letters here: M blocks of the vocabulary, W tokens of one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rung.core.records import Sampling
from rung.core.rng import gumbels, signed
from rung.core.shapes import Float, Int, Tensor
from rung.lm import fused

BLOCK = 256
BLOCK_STREAM = 1 << 40  # noise word of block 0: far above every token id
ROWS_AT_ONCE = 8  # on a CPU: 8 rows of 49 152 fp32 logits (1.5 MB) stay in the cache between the passes over them
FAR = 1e30  # what is taken from a logit that a filter drops: exp of the rest is exactly 0


@dataclass(frozen=True, eq=False)
class Laws:
    """How each of N rows is drawn: one `Sampling` and one key per row, as tensors.

    tempered, filtered, cut_k, cut_p: whether any row has a temperature other than 1, a filter, top-k, top-p (known here
    without asking the device)
    """

    key_N: Int[Tensor, "N"]
    temperature_N: Float[Tensor, "N"]
    top_k_N: Int[Tensor, "N"]
    top_p_N: Float[Tensor, "N"]
    min_p_N: Float[Tensor, "N"]
    tempered: bool
    filtered: bool
    cut_k: bool
    cut_p: bool

    @staticmethod
    def of(samplings: Sequence[Sampling], keys: Sequence[int], device: torch.device | str = "cpu") -> "Laws":
        """One law per sampling and 64-bit key."""
        filters = [(s.top_k, s.top_p, s.min_p) if s.temperature > 0 else (0, 1.0, 0.0) for s in samplings]
        top_k, top_p, min_p = zip(*filters, strict=True)
        return Laws(
            torch.tensor([signed(key) for key in keys], device=device),
            torch.tensor([float(s.temperature) for s in samplings], device=device),
            torch.tensor(top_k, device=device),
            torch.tensor(top_p, dtype=torch.float32, device=device),
            torch.tensor(min_p, dtype=torch.float32, device=device),
            tempered=any(s.temperature not in (0, 1) for s in samplings),
            filtered=any(f != (0, 1.0, 0.0) for f in filters),
            cut_k=any(top_k),
            cut_p=min(top_p) < 1,
        )

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """What differs from row to row."""
        return self.key_N, self.temperature_N, self.top_k_N, self.top_p_N, self.min_p_N

    @property
    def kind(self) -> tuple[bool, bool, bool, bool]:
        """What decides which operations draw."""
        return self.tempered, self.filtered, self.cut_k, self.cut_p


@dataclass(frozen=True, eq=False)
class Draws:
    """One token per row.

    logp_sampled_N: under the law drawn from (temperature, filters); 0 where temperature is 0: that law is a point mass
    logp_raw_N:     under the model (temperature 1, no filter); NaN where a logit was NaN or +inf
    gap_N:          distance of the best perturbed score from the second, the smaller of the two levels; logits that are
                    wrong by less than half of it draw the same token
    """

    token_N: Int[Tensor, "N"]
    logp_sampled_N: Float[Tensor, "N"]
    logp_raw_N: Float[Tensor, "N"]
    gap_N: Float[Tensor, "N"]

    def table(self) -> Float[Tensor, "N 4"]:
        """All four in fp64, in which ids are exact: one transfer to the host."""
        columns = (self.token_N, self.logp_sampled_N, self.logp_raw_N, self.gap_N)
        return torch.stack([column.double() for column in columns], 1)


def draw(logits_NV: Float[Tensor, "N V"], position_N: Int[Tensor, "N"], laws: Laws) -> Draws:
    """Draw the token at `position_N` of every row; log-probabilities in fp32, scores and gap in fp64.

    A row's temperature divides its logits; top-k, then top-p of what top-k left, then min-p narrow it (`_floors`).
    Temperature 0 takes the largest logit (the lowest id of equal ones) and ignores the filters.
    """
    vocabulary, device = logits_NV.shape[1], logits_NV.device
    num_blocks = -(-vocabulary // BLOCK)
    greedy_N1 = (laws.temperature_N == 0)[:, None]
    beta_N1 = torch.where(greedy_N1, 1.0, 1.0 / laws.temperature_N[:, None])
    if not laws.filtered and fused.serves(logits_NV) and logits_NV.is_contiguous():
        top_NM, lse_NM, raw_NM = fused.block_sums(logits_NV, beta_N1, BLOCK)
        raw_N, floor_N = raw_NM.logsumexp(1), torch.full_like(raw_NM[:, 0], -torch.inf)
    else:
        rows_at_once = ROWS_AT_ONCE if device.type == "cpu" else len(logits_NV)
        chunks = [slice(i, i + rows_at_once) for i in range(0, len(logits_NV), rows_at_once)]
        levels = [_levels(logits_NV[rows], beta_N1[rows], laws, rows) for rows in chunks]
        top_NM, lse_NM, raw_N, floor_N = (torch.cat(parts) for parts in zip(*levels, strict=True))

    blocks_M = torch.arange(num_blocks, device=device) + BLOCK_STREAM
    noise_NM = gumbels(laws.key_N, position_N, blocks_M)
    block_N, block_gap_N = _best(torch.where(greedy_N1, top_NM.double(), lse_NM + noise_NM))

    token_NW = block_N[:, None] * BLOCK + torch.arange(BLOCK, device=device)
    logit_NW = logits_NV.gather(1, token_NW.clamp(max=vocabulary - 1)).float()
    z_NW = logit_NW * beta_N1
    z_NW = z_NW.masked_fill((token_NW >= vocabulary) | (z_NW < floor_N[:, None]), -torch.inf)
    noise_NW = gumbels(laws.key_N, position_N, token_NW)
    word_N, word_gap_N = _best(torch.where(greedy_N1, z_NW.double(), z_NW + noise_NW))

    logp_N = _pick(z_NW, word_N) - lse_NM.logsumexp(1)
    return Draws(
        token_N=_pick(token_NW, word_N),
        logp_sampled_N=torch.where(greedy_N1[:, 0], 0.0, logp_N),
        logp_raw_N=_pick(logit_NW, word_N) - raw_N,
        gap_N=torch.minimum(block_gap_N, word_gap_N),
    )


def _levels(logits_NV: Tensor, beta_N1: Tensor, laws: Laws, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a few rows: largest z and lse of every block [N, M], lse of the raw logits [N], smallest z kept [N]."""
    z_NV = logits_NV.float()
    top_NM, lse_NM = _block_lse(z_NV)
    raw_N = lse_NM.logsumexp(1)
    floor_N = torch.full_like(raw_N, -torch.inf)
    if laws.tempered or laws.filtered:
        z_NV = z_NV * beta_N1
        if laws.filtered:
            floor_N = _floors(z_NV, laws, rows)
            z_NV = _drop_below(z_NV, floor_N)
        top_NM, lse_NM = _block_lse(z_NV)
    return top_NM, lse_NM, raw_N, floor_N


def _block_lse(z_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Largest entry and log-sum-exp of every block, [N, M]; -inf for a block without a finite entry."""
    missing = -z_NV.shape[1] % BLOCK
    if missing:
        z_NV = torch.nn.functional.pad(z_NV, (0, missing), value=-torch.inf)
    z_NMW = z_NV.view(len(z_NV), -1, BLOCK)
    top_NM = z_NMW.amax(-1)
    lse_NM = top_NM - z_NMW.log_softmax(-1).amax(-1)  # a block's largest log-softmax is top - lse: one fused pass
    return top_NM, lse_NM.masked_fill(top_NM == -torch.inf, -torch.inf)


def _floors(z_NV: Tensor, laws: Laws, rows: slice) -> Tensor:
    """The smallest z that survives each row's filters, [N]; every token with an equal z survives with it.

    top-k keeps the k largest.  top-p keeps a token if the tokens above it, renormalised over what top-k left, hold less
    than p in all [Holtzman 2020].  min-p keeps a token at least min_p times as probable as the most probable one
    [Nguyen 2024].
    """
    floor_N = z_NV.amax(1) + laws.min_p_N[rows].log()  # log 0 = -inf: no filter
    if laws.cut_k:
        k_N = laws.top_k_N[rows]
        cut_N = _cut(z_NV, torch.ones_like(z_NV), k_N.clamp(max=z_NV.shape[1]).float())
        cut_N = torch.where(k_N > 0, cut_N, -torch.inf)
        z_NV = _drop_below(z_NV, cut_N)
        floor_N = torch.maximum(floor_N, cut_N)
    if laws.cut_p:
        p_N = laws.top_p_N[rows]
        cut_N = _cut(z_NV, z_NV.softmax(1), p_N)
        floor_N = torch.maximum(floor_N, torch.where(p_N < 1, cut_N, -torch.inf))
    return floor_N


def _drop_below(z_NV: Tensor, floor_N: Tensor) -> Tensor:
    """z with every entry under its row's floor moved out of reach (ten times faster than `masked_fill` on a CPU)."""
    below_NV = torch.lt(z_NV, floor_N[:, None], out=torch.empty_like(z_NV))
    return z_NV.sub(below_NV, alpha=FAR)


def _cut(z_NV: Tensor, weight_NV: Tensor, target_N: Tensor) -> Tensor:
    """Largest t at which the entries z >= t weigh at least the target, [N]: 32 halvings of the ordered fp32 numbers.

    No sort: it is ten times slower on a CPU, and its time depends on the values.
    """
    high_N = _ordinal(z_NV.amax(1)) + 1
    low_N = _ordinal(torch.full_like(z_NV[:, 0], -torch.inf))
    above_NV = torch.empty_like(z_NV)
    for _ in range(32):
        middle_N = (low_N + high_N) >> 1
        torch.ge(z_NV, _number(middle_N)[:, None], out=above_NV)
        enough_N = above_NV.mul_(weight_NV).sum(1) >= target_N
        low_N, high_N = torch.where(enough_N, middle_N, low_N), torch.where(enough_N, high_N, middle_N)
    return _number(low_N)


def _ordinal(x_N: Tensor) -> Tensor:
    """fp32 numbers as integers of the same order."""
    bits_N = x_N.contiguous().view(torch.int32).long()
    return torch.where(bits_N < 0, -(bits_N & 0x7FFFFFFF), bits_N)


def _number(ordinal_N: Tensor) -> Tensor:
    """Inverse of `_ordinal`."""
    return ordinal_N.abs().int().view(torch.float32) * ordinal_N.sign()


def _best(score_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each row's largest score (the first of equal ones), and how far it is above the second."""
    if score_NM.shape[1] == 1:
        return score_NM.new_zeros(len(score_NM), dtype=torch.long), torch.full_like(score_NM[:, 0], torch.inf)
    first_N, second_N = score_NM.topk(2).values.unbind(1)
    return score_NM.argmax(1), first_N - second_N


def _pick(value_NM: Tensor, index_N: Tensor) -> Tensor:
    return value_NM.gather(1, index_N[:, None])[:, 0]
