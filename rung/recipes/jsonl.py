"""Your own questions: JSON lines, judged by math-verify or by functions of your own (docs/guide/your_task.md).

rung train grpo --model MODEL --data questions.jsonl
rung train grpo --model MODEL --data questions.jsonl --reward rewards.py:correct --reward rewards.py:short=0.2
"""

from rung.train.config import METHODS, GroupRL, Optim, TaskSpec

WORKING = "Work it out step by step, and end with a line 'Answer: ' and the result."


def grpo() -> GroupRL:
    """GRPO as it was published, for any model and any file of questions, on the machine at hand.

    Sizes are a beginning, not a result: 128 samples of up to 256 tokens a step.
    """
    return GroupRL(
        name="grpo",
        task=TaskSpec(name="maths", options={"data": ""}),
        num_steps=200,
        prompts_per_step=16,
        samples_per_prompt=8,
        max_tokens=256,
        method=METHODS["grpo"],
        optim=Optim(lr=5e-6, warmup=10, schedule="linear"),
        eval_problems=200,
        eval_every=50,
        checkpoint_every=25,
    )


def gpu_jsonl() -> GroupRL:
    """A model of 0.5 to 1.5 billion weights on one GPU: DAPO's objective, 512 samples of up to 1024 tokens a step.

    Not yet run: the sizes are counted, not measured (22 GB at 0.5 billion weights, 54 GB at 1.5); `--dry-run` counts
    them without a GPU too.
    """
    return GroupRL(
        name="gpu-jsonl",
        model="Qwen/Qwen2.5-0.5B-Instruct",
        task=TaskSpec(name="maths", options={"data": "", "suffix": WORKING}),
        num_steps=300,
        prompts_per_step=64,
        samples_per_prompt=8,
        max_tokens=1024,
        method=METHODS["dapo"],
        optim=Optim(lr=2e-6, warmup=10, grad_clip=1.0),
        slots=512,
        tokens_per_micro_batch=16384,
        dtype="bf16",
        device="cuda",
        activation_checkpointing=True,
        eval_problems=500,
        eval_every=50,
        checkpoint_every=50,
    )
