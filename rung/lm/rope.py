"""Rotary position embedding and its published scalings, bit for bit the frequencies of `transformers`.

A pair (x_i, x_{i+d/2}) is turned by the angle position * f_i with f_i = theta^(-2i/d).  [Su 2021; half-split: GPT-NeoX]

    linear    f / factor                                                                       [kaiokendev 2023]
    dynamic   theta * (factor * n / n0 - factor + 1)^(d / (d - 2)) for sequences of n > n0        [bloc97 2023]
    llama3    f where a wavelength is short, f / factor where it is long, a mix in between        [Llama 3.1]
    yarn      the same idea with a ramp over dimensions; cos and sin times 0.1 ln(factor) + 1     [Peng 2023]
    longrope  f / (one searched factor per dimension); another set beyond the trained length      [Ding 2024]
"""

import math
from functools import lru_cache

import torch

from rung.core.shapes import Float, Int, Tensor
from rung.lm.config import AttentionSpec, RopeSpec


def rotary_tables(
    spec: AttentionSpec, position_T: Int[Tensor, "T"], like: Tensor
) -> tuple[Float[Tensor, "T 1 r"], Float[Tensor, "T 1 r"]]:
    """cos and signed sin of every position, computed in fp32, then cast to dtype and device of `like`.

    The sine carries the sign of `rotate`.  Without positions (NoPE) they turn nothing: 1 and 0."""
    if spec.rope is None:
        zero_T1d = torch.zeros(len(position_T), 1, spec.turned).to(like)
        return zero_T1d + 1, zero_T1d
    frequency_d, scale = frequencies(spec.rope, spec.turned)
    angle_Td = position_T[:, None].float() * frequency_d
    cos_Td, sin_Td = angle_Td.cos() * scale, angle_Td.sin() * scale
    cos_Td, sin_Td = torch.cat((cos_Td, cos_Td), -1), torch.cat((-sin_Td, sin_Td), -1)
    return cos_Td[:, None].to(like), sin_Td[:, None].to(like)


def rotate(
    x_THd: Float[Tensor, "T H d"], cos_T1r: Float[Tensor, "T 1 r"], sin_T1r: Float[Tensor, "T 1 r"]
) -> Float[Tensor, "T H d"]:
    """Turn the first r dimensions of every head: [a, b] -> [a cos - b sin, b cos + a sin] on their two halves."""
    x_THr, rest = x_THd[..., : cos_T1r.shape[-1]], x_THd[..., cos_T1r.shape[-1] :]
    a_THr, b_THr = x_THr.chunk(2, -1)
    turned_THr = torch.addcmul(x_THr * cos_T1r, torch.cat((b_THr, a_THr), -1), sin_T1r)
    return torch.cat((turned_THr, rest), -1) if rest.shape[-1] else turned_THr


def rotate_(x_THd: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> None:
    """`rotate` in place, outside autograd.  With -sin it turns back, which is also its gradient."""
    x_THr = x_THd[..., : cos_T1r.shape[-1]]
    a_THr, b_THr = x_THr.chunk(2, -1)
    turned_THr = torch.cat((b_THr, a_THr), -1)
    x_THr.mul_(cos_T1r).addcmul_(turned_THr, sin_T1r)


@lru_cache(maxsize=64)
def frequencies(spec: RopeSpec, head_dim: int) -> tuple[Float[Tensor, "d"], float]:
    """The head_dim / 2 angular frequencies (fp32, radians per position) and the factor on cos and sin."""
    exponent_d = torch.arange(0, head_dim, 2).float() / head_dim
    return SCALINGS[spec.scaling](spec, exponent_d)


def _plain(spec: RopeSpec, exponent_d: Tensor) -> tuple[Tensor, float]:
    return 1.0 / spec.theta**exponent_d, 1.0


def _linear(spec: RopeSpec, exponent_d: Tensor) -> tuple[Tensor, float]:
    return _plain(spec, exponent_d)[0] / spec.factor, 1.0


def _dynamic(spec: RopeSpec, exponent_d: Tensor) -> tuple[Tensor, float]:
    head_dim = 2 * len(exponent_d)
    length = max(spec.context, spec.original_positions)
    stretch = spec.factor * length / spec.original_positions - (spec.factor - 1)
    theta = spec.theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / theta**exponent_d, 1.0


def _llama3(spec: RopeSpec, exponent_d: Tensor) -> tuple[Tensor, float]:
    frequency_d, _ = _plain(spec, exponent_d)
    turns_d = spec.original_positions / (2 * math.pi / frequency_d)  # full turns within the trained length
    mix_d = ((turns_d - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
    return (1 - mix_d) * frequency_d / spec.factor + mix_d * frequency_d, 1.0


def _yarn(spec: RopeSpec, exponent_d: Tensor) -> tuple[Tensor, float]:
    half, head_dim = len(exponent_d), 2 * len(exponent_d)

    def dimension(turns: float) -> float:  # at which a frequency makes `turns` turns within the trained length
        return head_dim * math.log(spec.original_positions / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp_d = ((torch.arange(half).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    frequency_d, _ = _plain(spec, exponent_d)
    scale = spec.attention_factor
    if scale is None and spec.mscale and spec.mscale_all_dim:
        scale = _mscale(spec.factor, spec.mscale) / _mscale(spec.factor, spec.mscale_all_dim)
    elif scale is None:
        scale = _mscale(spec.factor, 1.0)
    return frequency_d / spec.factor * ramp_d + frequency_d * (1 - ramp_d), scale


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(spec: RopeSpec, exponent_d: Tensor) -> tuple[Tensor, float]:
    chosen = spec.long_factor if spec.context > spec.original_positions else spec.short_factor
    scale = spec.attention_factor
    if scale is None:
        log_ratio = math.log(max(spec.factor, 1.0)) / math.log(spec.original_positions)
        scale = math.sqrt(1 + log_ratio)
    return 1.0 / (torch.tensor(chosen) * spec.theta**exponent_d), scale


SCALINGS = {
    "none": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
