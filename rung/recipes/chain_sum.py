"""`chain_sum` of reasoning-gym: sums and differences of two or three one-digit numbers, as that package words them."""

from rung.train.config import METHODS, GroupRL, Optim, TaskSpec


def chain_sum() -> GroupRL:
    """SmolLM2-135M-Instruct learns short chains of + and -.  Settings are those of `arithmetic`; nothing was tuned.

    It begins at about 0.3 greedy and 0.1 sampled (40 problems each).
    """
    return GroupRL(
        name="chain-sum",
        task=TaskSpec(
            name="reasoning-gym:chain_sum",
            options={
                "min_terms": 2,
                "max_terms": 3,
                "min_digits": 1,
                "max_digits": 1,
                "size": 20_000,
                "opening": "The answer is",
            },
        ),
        num_steps=150,
        prompts_per_step=32,
        samples_per_prompt=8,
        max_tokens=16,
        temperature=1.0,
        method=METHODS["dr_grpo"],
        optim=Optim(lr=2e-5, beta2=0.999, grad_clip=10.0, warmup=4, schedule="linear"),
        eval_problems=250,
        eval_every=50,
        checkpoint_every=25,
    )
