"""What a group-based RL run is, as frozen values.  A run is `GroupRL`; a method is a row of `METHODS`.

A name in a `Method` is looked up once, when the run is built, in the tables of `rung.objectives`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rung.lm.adapters.spec import LoRA
from rung.tasks.sandbox import Limits


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the spine; each cell can be replaced.  Sources: docs/guide/methods.md.

    advantage:   none, mean, leave_one_out, std (of a group's rewards)
    surrogate:   pg, clip, clip_sequence (the ratio of the whole sequence)
    eps_low, eps_high: bounds of the clip
    kl:          none; k1_reward (per token, return-to-go, subtracted after normalisation); square (of the whole
                 sequence's log-ratio); k3_loss
    kl_coef:     its weight (beta)
    denominator: sequence_mean, tokens, group_tokens, constant, sequences
    dynamic_sampling: groups whose rewards are all equal are dropped and replaced, at most `max_refills` times
    overlong:    none; shape (DAPO eq. 13, over the last `overlong_cache` tokens, 0 being a fifth of max_tokens);
                 mask (a sample that was cut off is not trained on)
    entropy_coef: weight of an entropy bonus
    """

    advantage: Literal["none", "mean", "leave_one_out", "std"] = "std"
    surrogate: Literal["pg", "clip", "clip_sequence"] = "clip"
    eps_low: float = 0.2
    eps_high: float = 0.2
    kl: Literal["none", "k1_reward", "square", "k3_loss"] = "none"
    kl_coef: float = 0.0
    denominator: Literal["sequence_mean", "tokens", "group_tokens", "constant", "sequences"] = "sequence_mean"
    dynamic_sampling: bool = False
    max_refills: int = 4
    overlong: Literal["none", "shape", "mask"] = "none"
    overlong_cache: int = 0
    entropy_coef: float = 0.0


METHODS: Mapping[str, Method] = {
    "reinforce": Method(advantage="mean", surrogate="pg", denominator="sequences"),
    "rloo": Method(advantage="leave_one_out", surrogate="pg", kl="k1_reward", kl_coef=0.05, denominator="sequences"),
    "grpo": Method(advantage="std", surrogate="clip", kl="k3_loss", kl_coef=0.04, denominator="sequence_mean"),
    "dr_grpo": Method(advantage="mean", surrogate="clip", denominator="constant"),
    "dapo": Method(
        advantage="std",
        surrogate="clip",
        eps_high=0.28,
        denominator="tokens",
        dynamic_sampling=True,
        overlong="shape",
    ),
    "dapo_paper": Method(
        advantage="std",
        surrogate="clip",
        eps_high=0.28,
        denominator="group_tokens",
        dynamic_sampling=True,
        overlong="shape",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task by name (`arithmetic`, `reasoning-gym:chain_sum`, `module:name` or `file.py:name`) and its options."""

    name: str
    options: Mapping[str, int | float | str | bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW on fp32 masters.

    lr:           the highest learning rate
    beta1, beta2, eps: AdamW's decay rates and denominator
    weight_decay: of matrices; norms and biases have none
    grad_clip:    largest norm of the gradient
    warmup:       updates in which the rate rises linearly
    schedule:     constant, linear or cosine (to zero at num_steps), after the warm-up
    """

    lr: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"


@dataclass(frozen=True, kw_only=True)
class GroupRL:
    """A whole run of REINFORCE, RLOO, GRPO, Dr. GRPO or DAPO on one machine.

    name:            of the run, and of its folder under `runs/`
    model:           a name (`smollm2-135m`) or a Hugging Face folder
    foreign:         through transformers although Rung has the model's family; other families go that way anyhow
    seed:            of all draws; also names the training problems
    num_steps:       rollout-and-learn steps
    prompts_per_step, samples_per_prompt: groups of a step, and their size (G)
    max_tokens, temperature: of an answer; the learner scores at the same temperature
    max_turns:       answers of an episode, at most; 1 is for tasks that end after one
    max_length:      positions of a whole episode, prompt included; 0: as many as the model has
    lora:            an adapter that learns in the weights' place; its optim.lr is some ten times theirs
    updates_per_rollout: 1 is on-policy; more slices the step's groups, and logp_old is recomputed by the learner
    slots:           samples decoded at a time, at most; each holds a key-value cache of its own
    tokens_per_micro_batch: upper bound on the flat token axis of one forward and backward pass
    share_prompts:   what prompts have in common is computed once in the learner too
    dtype:           auto is bf16 where the machine multiplies it fast, else fp32
    device:          cpu, cuda, or cuda:1 for the second of several GPUs; not yet run on a GPU
    activation_checkpointing: a layer keeps its input alone for the backward pass, and is computed again there
    eval_problems:   held-out problems answered greedily before the first step and after the last
    eval_every, validation_problems: steps between looks at a third set of problems; the best one's checkpoint is kept
    checkpoint_every: steps between checkpoints; a step whose validation problems were answered is saved too
    threads:         0 takes all cores
    grading:         what the verifier may use: seconds of one answer, memory, processes, network
    top_k, top_p, min_p, repetition_penalty: refused unless neutral: the learner scores the whole softmax, and samples
                     of another law would make every update silently off-policy
    """

    name: str
    task: TaskSpec
    model: str = "smollm2-135m"
    foreign: bool = False
    seed: int = 0
    num_steps: int = 100
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    max_tokens: int = 16
    temperature: float = 1.0
    max_turns: int = 1
    max_length: int = 0
    method: Method = METHODS["grpo"]
    optim: Optim = field(default_factory=Optim)
    lora: LoRA = field(default_factory=LoRA)
    updates_per_rollout: int = 1
    slots: int = 256
    tokens_per_micro_batch: int = 2048
    share_prompts: bool = True
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "cpu"
    activation_checkpointing: bool = False
    eval_problems: int = 500
    eval_every: int = 0
    validation_problems: int = 128
    checkpoint_every: int = 20
    threads: int = 0
    grading: Limits = field(default_factory=Limits)
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
