"""The peers' sides: `transformers` generate, and `trl`'s GRPOTrainer, each as its authors ship it.

Settings are the ones that suit the peer best on a CPU: fused attention, no gradient checkpointing (trl has it on unless
told), no logging, equal micro-batches.  A dtype is one of

    fp32       weights and arithmetic
    bf16       trl's own `bf16=True`: fp32 weights under autocast
    pure-bf16  weights, gradients and optimiser in bf16; fast, but small updates are rounded away: no master weights
"""

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from bench import workload

Turn = Callable[[int], Mapping[str, float]]


def rollout(spec: Mapping[str, Any]) -> Turn:
    """`transformers` generate over the whole batch, left-padded; rows run to the longest of the lengths asked for."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # lengths are forced: no row ends before its own
    model.generation_config.pad_token_id = 0
    rows = [p for p in spec["prompts"] for _ in range(spec["samples"])]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def turn(number: int) -> Mapping[str, float]:
        start = time.perf_counter()
        out_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(spec["lengths"]),
        )
        taken = time.perf_counter() - start
        assert out_BT.shape == (len(rows), longest + max(spec["lengths"]))
        return {"seconds": taken, "tokens": sum(spec["lengths"])}

    return turn


def learner(spec: Mapping[str, Any]) -> Turn:
    """`GRPOTrainer._compute_loss` and its backward pass on one fixed batch."""
    trainer = _trainer(spec, num_prompts=1, samples=2, max_tokens=16, micro_batch=2)
    groups = workload.batch(spec["batch"], trainer.model.config.vocab_size)
    rows = [(p, c, a) for p, cs, rewards in groups for c, a in zip(cs, _advantages(rewards), strict=True)]
    pieces = [rows[i : i + spec["micro_batch"]] for i in range(0, len(rows), spec["micro_batch"])]
    inputs = [_padded(piece, sum(len(c) for _, c, _ in rows)) for piece in pieces]
    trainer.current_gradient_accumulation_steps = len(inputs)
    trainer.args.steps_per_generation = len(inputs)
    model = trainer.model.train()

    def turn(number: int) -> Mapping[str, float]:
        start = time.perf_counter()
        for piece in inputs:
            trainer._compute_loss(model, piece).backward()
        taken = time.perf_counter() - start
        norm = float(torch.nn.utils.get_total_norm([p.grad.float() for p in model.parameters()]))
        model.zero_grad(set_to_none=True)
        return {"seconds": taken, "tokens": sum(len(c) for _, c, _ in rows), "grad_norm": norm}

    return turn


def step(spec: Mapping[str, Any]) -> Turn:
    """One whole step of `GRPOTrainer.train`, held between its own callbacks: generate, grade, loss, optimiser."""
    sizes = {name: spec[name] for name in ("num_prompts", "samples", "max_tokens", "micro_batch")}
    trainer = _trainer(spec, **sizes, lora=spec.get("lora"))
    gate = _Gate()
    trainer.add_callback(gate)
    threading.Thread(target=gate.guard, args=(trainer.train,), daemon=True).start()

    def turn(number: int) -> Mapping[str, float]:
        gate.go.release()
        gate.done.acquire()
        if gate.error is not None:
            raise gate.error
        return {"seconds": gate.seconds, "tokens": spec["num_prompts"] * spec["samples"] * spec["max_tokens"]}

    return turn


class _Gate(TrainerCallback):
    """Lets the trainer do one step at a time, and times it."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds, self._start = 0.0, 0.0
        self.error: BaseException | None = None

    def guard(self, train: Callable[[], object]) -> None:
        """Run `train`, and hand what it raises to the thread that waits."""
        try:
            train()
        except BaseException as error:
            self.error = error
            self.done.release()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.go.acquire()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self._start
        self.done.release()


def _trainer(
    spec: Mapping[str, Any],
    *,
    num_prompts: int,
    samples: int,
    max_tokens: int,
    micro_batch: int,
    lora: Mapping[str, Any] | None = None,
):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    sequences = num_prompts * samples
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="rung-bench-"),
        use_cpu=True,
        bf16=spec["dtype"] == "bf16",
        fp16=False,
        gradient_checkpointing=False,
        model_init_kwargs={
            "dtype": "bfloat16" if spec["dtype"] == "pure-bf16" else "float32",
            "attn_implementation": "sdpa",
        },
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=sequences // micro_batch,
        num_generations=samples,
        max_completion_length=max_tokens,
        generation_kwargs={"min_new_tokens": max_tokens},
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-6,
        max_steps=1000,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        disable_dropout=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        seed=0,
    )
    asked = Dataset.from_dict({"prompt": [[{"role": "user", "content": p["prompt"]}] for p in workload.problems()]})
    adapter = None
    if lora is not None:
        adapter = LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
    return GRPOTrainer(spec["model"], reward_funcs=_rewards, args=config, train_dataset=asked, peft_config=adapter)


def _rewards(completions: list, **_: Any) -> list[float]:
    return [workload.reward(None, messages[0]["content"]) for messages in completions]


def _advantages(rewards: list[float]) -> list[float]:
    """trl's: minus the mean, over the standard deviation plus 1e-4."""
    r = torch.tensor(rewards)
    return ((r - r.mean()) / (r.std() + 1e-4)).tolist()


def _padded(rows: list[tuple[list[int], list[int], float]], tokens: int) -> dict[str, Any]:
    """trl's own form of a batch: prompts padded on the left, completions on the right."""
    left = max(len(p) for p, _, _ in rows)
    right = max(len(c) for _, c, _ in rows)
    return {
        "prompt_ids": torch.tensor([[0] * (left - len(p)) + p for p, _, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p, _, _ in rows]),
        "completion_ids": torch.tensor([c + [0] * (right - len(c)) for _, c, _ in rows]),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (right - len(c)) for _, c, _ in rows]),
        "advantages": torch.tensor([a for _, _, a in rows]),
        "num_items_in_batch": torch.tensor(tokens),
    }
