"""The default recipe: two-digit addition by reinforcement learning alone.

No worked answer is shown, and nothing is supervised: the only signal is whether the last number of a sampled answer is
the sum, and whether the answer ended by itself.
"""

from rung.train.config import METHODS, GroupRL, Optim, TaskSpec


def arithmetic(*, operations: str = "+", digits: int = 2, terms: int = 2) -> GroupRL:
    """SmolLM2-135M-Instruct learns sums.

    Dr. GRPO at temperature 1.2 (which keeps carries explored), with a long AdamW memory (beta2) and a loose clip: the
    best of ten settings tried with one seed each, not an ablation (docs/log.md).
    """
    return GroupRL(
        name="arithmetic",
        task=TaskSpec(
            name="arithmetic",
            options={
                "operations": operations,
                "digits": digits,
                "terms": terms,
                "prompt": "{expression}",
                "system": "Calculate.",
                "opening": "${expression} =",
            },
        ),
        num_steps=190,
        prompts_per_step=32,
        samples_per_prompt=8,
        max_tokens=8,
        temperature=1.2,
        method=METHODS["dr_grpo"],
        optim=Optim(lr=2e-5, beta2=0.999, grad_clip=10.0, warmup=4, schedule="linear"),
        eval_every=50,
        checkpoint_every=25,
    )
