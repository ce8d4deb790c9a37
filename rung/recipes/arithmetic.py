"""The default recipe: two-digit addition by reinforcement learning alone.

No worked answer is shown, and nothing is supervised: the only signal is whether the last number of a sampled answer is
the sum, and whether the answer ended by itself.
"""

from rung.train.config import METHODS, GroupRL, Optim, TaskSpec


def arithmetic(*, operations: str = "+", digits: int = 2, terms: int = 2) -> GroupRL:
    """SmolLM2-135M-Instruct learns sums; about 15 minutes on two cores."""
    return GroupRL(
        name="arithmetic",
        task=TaskSpec(
            name="arithmetic",
            options={
                "operations": operations,
                "digits": digits,
                "terms": terms,
                "prompt": "What is {expression}?",
                "system": "You are a calculator.",
                "opening": "{expression} =",
            },
        ),
        num_steps=120,
        prompts_per_step=16,
        samples_per_prompt=8,
        max_tokens=8,
        method=METHODS["dr_grpo"],
        optim=Optim(lr=1e-5, warmup=5, schedule="linear"),
        eval_every=40,
    )
