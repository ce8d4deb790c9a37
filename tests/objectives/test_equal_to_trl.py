"""Loss and gradient equal to trl's own code, from the installed wheel, on a tiny random Llama.

Only the drawing of tokens is replaced in trl's trainers: padding, masks, advantages, reference log-probabilities, loss
and backward are theirs.  What differs on purpose is stated in docs/guide/methods.md, and tested here.
"""

import warnings
from dataclasses import replace

import pytest
import torch

from rung.core.records import Completion, Sampling, TokenScores
from rung.objectives.kl import k2
from rung.objectives.logprobs import token_logprobs
from rung.objectives.reduce import masked_sum, total_loss
from rung.train.config import METHODS
from rung.train.data import count, pack, pack_one, sample_of, unpack, with_stream
from rung.train.methods import build_objective, group_streams

pytestmark = pytest.mark.filterwarnings("ignore")  # trl and transformers warn of much

EOS, WORDS, LIMIT, TEMPERATURE = 2, 40, 6, 0.8
PROMPTS = [(3, 4, 5, 6), (7, 8)]
COMPLETIONS = [
    [(9, 10, EOS), (11, EOS), (12, 13, 14, 15, 16, 17)],
    [(18, EOS), (19, 20, 21, EOS), (22, 23, 24, 25, EOS)],
]
REWARDS = [[1.0, 0.25, -0.5], [0.0, 0.75, 2.0]]
SIZE = 3


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """trl, transformers and a saved tiny model with its tokenizer, imported and made once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

        vocabulary = {f"w{n}": n for n in range(3, WORDS)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
        )
        folder = str(tmp_path_factory.mktemp("tiny"))
        with torch.random.fork_rng():
            draw_globally_from(0)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=WORDS,
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=EOS,
                    initializer_range=0.5,
                )
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def trainer(kind, **options):
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            draw_globally_from(1)
            return make_trainer({"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind], options)

    def make_trainer(classes, options):
        from datasets import Dataset

        cls, config = classes
        made = cls(
            model=LlamaForCausalLM.from_pretrained(folder),
            reward_funcs=lambda completions, **_: [r for group in REWARDS for r in group],
            args=config(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                per_device_train_batch_size=len(PROMPTS) * SIZE,
                num_generations=SIZE,
                max_completion_length=LIMIT,
                temperature=TEMPERATURE,
                **options,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["w3"] * 2}),
            processing_class=tokenizer,
        )
        made.model.train()
        made.current_gradient_accumulation_steps = 1
        drawn = [[list(ids) for group in COMPLETIONS for ids in group], None]
        made._tokenize_prompts = lambda prompts: ([list(p) for p in PROMPTS for _ in range(SIZE)], None, {})
        made._generate_single_turn = lambda *args: drawn if kind_of(cls) == "grpo" else drawn[0]
        if made.ref_model is not None:
            disturb(made.ref_model, 0.05)
        return made

    return trainer


def draw_globally_from(seed):
    """The peers draw weights from PyTorch's global generator; one draw in many rounds more than the tolerance."""
    torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())


def kind_of(cls):
    return "grpo" if "GRPO" in cls.__name__ else "rloo"


def disturb(model, scale):
    """Another model: without it, the reference equals the policy and no KL term is seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


class Llama:
    """Their model as our policy: one sequence at a time, without padding."""

    def __init__(self, model):
        self.model = model

    def scores(self, batch):
        logp_T, entropy_T = (torch.zeros(len(batch.tokens_T)) for _ in range(2))
        for number in range(len(batch.last_S)):
            rows = (batch.sequence_T == number).nonzero()[:, 0]
            hidden_1TD = self.model.model(batch.tokens_T[rows][None]).last_hidden_state
            known = token_logprobs(
                hidden_1TD[0, :-1], self.model.lm_head.weight, batch.tokens_T[rows[1:]], temperature=TEMPERATURE
            )
            logp_T, entropy_T = (x.index_put((rows[1:],), y) for x, y in zip((logp_T, entropy_T), known, strict=True))
        keep_T = batch.trainable_T
        return TokenScores(logp_T=torch.where(keep_T, logp_T, 0), entropy_T=torch.where(keep_T, entropy_T, 0))


def our_samples(method, streams):
    """The groups as samples; `streams`: (name, per completion a list of values) to attach before."""
    samples, at = [], 0
    for group_id, (prompt, completions, rewards) in enumerate(zip(PROMPTS, COMPLETIONS, REWARDS, strict=True)):
        group = []
        for ids, reward in zip(completions, rewards, strict=True):
            completion = Completion(
                token_ids=ids,
                logp_sampled=(0.0,) * len(ids),
                logp_raw=(0.0,) * len(ids),
                stop="eos" if ids[-1] == EOS else "length",
                policy_version=0,
                weights_hash="",
                sampling=Sampling(max_tokens=LIMIT),
                key=at,
            )
            sample = sample_of(prompt, completion, problem_id="", group_id=group_id, reward=reward)
            for name, values in streams.items():
                blank = torch.zeros(len(prompt))
                sample = with_stream(sample, name, torch.cat([blank, values[at][: len(ids)]]))
            group.append(sample)
            at += 1
        cut = [ids[-1] != EOS for ids in completions]
        samples += group_streams(method, group, max_tokens=LIMIT, cut=cut)
    return samples


def ours(model, method, streams, *, tokens_per_batch=10_000):
    """Our loss and gradients on their model, over micro-batches."""
    samples = our_samples(method, streams)
    counts = count(samples)
    batches = pack(samples, counts=counts, tokens_per_batch=tokens_per_batch, share_prompts=False)
    objective = build_objective(method)
    loss = torch.stack([total_loss(objective(Llama(model), batch))[0] for batch in batches]).sum()
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def theirs(trainer, inputs):
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss.detach(), torch.autograd.grad(loss, list(trainer.model.parameters()))


def scored(trainer):
    """Their whole preparation of a step: padding, masks, rewards, advantages, reference."""
    return trainer._generate_and_score_completions([{"prompt": "w3"} for p in PROMPTS for _ in range(SIZE)])


def distance(found, expected):
    """Largest relative distance of two lists of gradients, parameter by parameter."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def drift(shape):
    """A made-up distance of the old policy, wide enough to meet both bounds of the clip."""
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(2))


GRPO_ROWS = {
    "grpo": (METHODS["grpo"], {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}),
    "grpo without kl": (replace(METHODS["grpo"], kl="none", kl_coef=0.0), {"loss_type": "grpo"}),
    "dr_grpo": (METHODS["dr_grpo"], {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (replace(METHODS["dapo"], overlong="none"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo mask": (
        replace(METHODS["dapo"], overlong="mask"),
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
    ),
    "dapo entropy": (
        replace(METHODS["dapo"], overlong="none", entropy_coef=0.1),
        {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.1},
    ),
}


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("row", GRPO_ROWS)
def test_loss_and_every_gradient_equal_those_of_trls_grpo_trainer(peers, row, off_policy):
    method, options = GRPO_ROWS[row]
    trainer = peers("grpo", **options)
    inputs = scored(trainer)
    streams = {}
    if off_policy:
        own = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].shape[1],
        )[0]
        inputs["old_per_token_logps"] = own.detach() + drift(own.shape)
        streams["logp_old"] = inputs["old_per_token_logps"]
    if method.kl != "none":
        streams["logp_ref"] = inputs["ref_per_token_logps"]
    expected_loss, expected = theirs(trainer, inputs)
    for tokens_per_batch in (10_000, 12):
        loss, found = ours(trainer.model, method, streams, tokens_per_batch=tokens_per_batch)
        assert float(loss) == pytest.approx(float(expected_loss), abs=1e-5)
        assert distance(found, expected) < 1e-5
    if off_policy:
        wide = replace(method, eps_low=1e9, eps_high=1e9)
        assert distance(ours(trainer.model, wide, streams)[1], expected) > 1e-3  # the clip was met


@pytest.mark.parametrize("off_policy", [False, True])
def test_loss_and_every_gradient_equal_those_of_trls_rloo_trainer(peers, off_policy):
    """trl's RLOO takes the clipped ratio of the whole sequence: our surrogate clip_sequence."""
    method = replace(METHODS["rloo"], surrogate="clip_sequence", kl="none", kl_coef=0.0)
    trainer = peers("rloo", beta=0.0)
    inputs = scored(trainer)
    streams = {}
    if off_policy:
        old = own_logps(trainer.model)
        moved = [x + drift(x.shape) for x in old]
        inputs["old_logps"] = torch.stack([x.sum() for x in moved])
        streams["logp_old"] = moved
    expected_loss, expected = theirs(trainer, inputs)
    loss, found = ours(trainer.model, method, streams)
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-5)
    assert distance(found, expected) < 1e-5


def own_logps(model):
    """Log-probabilities of every completion's tokens under the model, by our own pass."""
    samples = our_samples(METHODS["dr_grpo"], {})
    batch = pack_one(samples, counts=count(samples), share_prompts=False)
    values = unpack(batch, Llama(model).scores(batch).logp_T.detach(), samples)
    return [x[s.trainable] for x, s in zip(values, samples, strict=True)]


def test_on_policy_the_preset_rloo_has_trls_gradient_and_a_loss_value_of_its_own(peers):
    """pg is A log pi, trl's value is A x 1: the same gradient, and neither value means anything."""
    trainer = peers("rloo", beta=0.0)
    expected_loss, expected = theirs(trainer, scored(trainer))
    loss, found = ours(trainer.model, replace(METHODS["rloo"], kl="none", kl_coef=0.0), {})
    assert distance(found, expected) < 1e-5
    assert float(expected_loss) == pytest.approx(0.0, abs=1e-6)  # minus the mean of advantages that sum to zero
    assert abs(float(loss)) > 0.1


def test_with_kl_in_the_reward_the_difference_to_trl_is_the_baseline_of_the_kl(peers):
    """trl: the KL of the whole sequence enters the reward before the baseline.  Ours: return-to-go, after it.

    Built here from our parts, theirs is met; the difference is zero in expectation (tests/truth).
    """
    beta = 0.5
    trainer = peers("rloo", beta=beta)
    inputs = scored(trainer)
    _, expected = theirs(trainer, inputs)
    reference = own_logps(trainer.ref_model)
    method = replace(METHODS["rloo"], kl_coef=beta)
    _, found = ours(trainer.model, method, {"logp_ref": reference})
    assert distance(found, expected) > 1e-2
    rates = [own - ref for own, ref in zip(own_logps(trainer.model), reference, strict=True)]
    samples = our_samples(replace(method, kl="none", kl_coef=0.0), {})
    corrected = []
    for i, sample in enumerate(samples):
        group = range(i // SIZE * SIZE, i // SIZE * SIZE + SIZE)
        others = sum(float(rates[j].sum()) for j in group if j != i) / (SIZE - 1)
        advantage_T = sample.streams["advantage"] - beta * (float(rates[i].sum()) - others)
        corrected.append(with_stream(sample, "advantage", advantage_T))
    objective = build_objective(replace(method, kl="none", kl_coef=0.0))
    batch = pack_one(corrected, counts=count(corrected), share_prompts=False)
    loss, _ = total_loss(objective(Llama(trainer.model), batch))
    assert distance(torch.autograd.grad(loss, list(trainer.model.parameters())), expected) < 1e-5


def test_trls_default_kl_loss_is_the_ratio_times_k3_whose_gradient_is_that_of_k2(peers):
    """Since 1.16 `use_bias_correction_kl` is on: on-policy r grad log pi, where k3 has (1 - exp(-r)) grad log pi."""
    beta = 0.5
    trainer = peers("grpo", loss_type="grpo", beta=beta)
    inputs = scored(trainer)
    _, expected = theirs(trainer, inputs)
    method = replace(METHODS["grpo"], kl_coef=beta)
    reference = inputs["ref_per_token_logps"]
    _, by_k3 = ours(trainer.model, method, {"logp_ref": reference})
    assert distance(by_k3, expected) > 1e-2
    samples = our_samples(method, {"logp_ref": reference})
    batch = pack_one(samples, counts=count(samples), share_prompts=False)
    scores = Llama(trainer.model).scores(batch)
    policy_term = build_objective(replace(method, kl="none", kl_coef=0.0))(Llama(trainer.model), batch)
    k2_T = beta * batch.streams["weight"] * k2(scores.logp_T, batch.streams["logp_ref"])
    loss = total_loss(policy_term)[0] + masked_sum(k2_T, batch.trainable_T) / len(samples)
    assert distance(torch.autograd.grad(loss, list(trainer.model.parameters())), expected) < 1e-5


def test_our_advantages_are_those_that_trl_computed(peers):
    for method, trainer in (
        (METHODS["grpo"], peers("grpo")),
        (METHODS["dr_grpo"], peers("grpo", scale_rewards="none")),
        (METHODS["rloo"], peers("rloo", beta=0.0)),
    ):
        found = [float(s.streams["advantage"][-1]) for s in our_samples(method, {})]
        assert found == pytest.approx(scored(trainer)["advantages"].tolist(), abs=1e-6)
