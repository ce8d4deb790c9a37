"""`chain_sum` of reasoning-gym: sums and differences of two numbers of up to two digits, as that package words them."""

from rung.train.config import METHODS, GroupRL, Optim, TaskSpec


def chain_sum() -> GroupRL:
    """SmolLM2-135M-Instruct learns short chains of + and -.  Settings are those of `arithmetic`.

    Of three forms that were tried once each, the one with most contents; with three terms of one digit half of the
    problems drawn are of a few hundred contents, and what is held out gains half as much (docs/log.md).
    """
    return GroupRL(
        name="chain-sum",
        task=TaskSpec(
            name="reasoning-gym:chain_sum",
            options={
                "min_terms": 2,
                "max_terms": 2,
                "min_digits": 1,
                "max_digits": 2,
                "size": 20_000,
                "opening": "The answer is",
            },
        ),
        num_steps=100,
        prompts_per_step=32,
        samples_per_prompt=8,
        max_tokens=8,
        temperature=1.2,
        method=METHODS["dr_grpo"],
        optim=Optim(lr=2e-5, beta2=0.999, grad_clip=10.0, warmup=4, schedule="linear"),
        eval_problems=500,
        eval_every=25,
        checkpoint_every=25,
    )
