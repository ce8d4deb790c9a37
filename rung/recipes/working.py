"""Sums whose every running total must be written down: working and answer are judged (`rung/tasks/steps.py`)."""

from rung.train.config import METHODS, GroupRL, Optim, TaskSpec


def working() -> GroupRL:
    """SmolLM2-135M-Instruct learns to add in visible steps, in up to 256 tokens.

    Settings are those of `arithmetic`; nothing was tuned.
    """
    return GroupRL(
        name="working",
        task=TaskSpec(name="steps", options={"largest": 99, "terms": 3, "examples": 2}),
        num_steps=60,
        prompts_per_step=16,
        samples_per_prompt=8,
        max_tokens=256,
        temperature=1.0,
        method=METHODS["dr_grpo"],
        optim=Optim(lr=2e-5, beta2=0.999, grad_clip=10.0, warmup=4, schedule="linear"),
        eval_problems=300,
        eval_every=20,
        validation_problems=64,
        checkpoint_every=20,
    )
