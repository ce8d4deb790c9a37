"""LoRA against its formula, against PEFT on the published model, and against the base that it must leave alone."""

import math
from dataclasses import replace

import pytest
import torch
from lm.lora_twins import NAMES, PROMPTS, adapted, config, dense_logits, filled, peft_of, their_folder
from torch import nn
from torch.nn import functional as F

from rung.core.errors import ConfigError
from rung.core.records import GroupRequest, Layout, Sampling
from rung.engine.engine import Engine
from rung.lm.adapters import lora
from rung.lm.adapters.lora import Adapter, BaseDecoder, Site, linear_sites, native_sites, num_weights
from rung.lm.adapters.spec import LoRA
from rung.lm.decoder import Decoder
from rung.lm.linear import PACK_AFTER, Linear, keeps_blocks
from rung.model.model import load

RANK3 = LoRA(rank=3, alpha=5.0)
QKV = {"q": (0, 12), "k": (12, 16), "v": (16, 20)}  # q has three times the rows of k
needs_bf16 = pytest.mark.skipif(not keeps_blocks("cpu", torch.bfloat16), reason="nothing is kept on this processor")


def sampled(decoder: Decoder, rows: int = 3, length: int = 20):
    """Tokens and log-probabilities of cached decoding."""
    keys = tuple(range(rows))
    request = GroupRequest(prompt_ids=(3, 1, 4), keys=keys, sampling=Sampling(max_tokens=length))
    ((drawn,), _) = Engine(decoder).run([request])
    return [(c.token_ids, c.logp_raw) for c in drawn]


def one_layer(spec: LoRA, parts=QKV, width: int = 7, rows: int = 20, dtype=torch.float64, of_torch: bool = False):
    """A layer and its adapter, all numbers random."""
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(width, rows, dtype=dtype) if of_torch else Linear(width, rows, True, dtype)
    adapter = Adapter(layer, [Site("layer", layer, parts)], spec, seed=0, dtype=dtype)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *adapter.parameters.values()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer, adapter


def by_the_formula(layer: nn.Module, adapter: Adapter, x_ND: torch.Tensor, scaling: float) -> torch.Tensor:
    """W x + b + scaling B A x, part by part, in autograd's own operations."""
    (site,) = adapter.sites
    a_RD, b_FR = adapter.parameters["layer.lora_A"], adapter.parameters["layer.lora_B"]
    delta_ED, rank, below = torch.zeros_like(layer.weight), adapter.spec.rank, 0
    for number, (start, stop) in enumerate(site.parts.values()):
        product = b_FR[below : below + stop - start] @ a_RD[number * rank : (number + 1) * rank]
        delta_ED = delta_ED + F.pad(product, (0, 0, start, len(layer.weight) - stop))
        below += stop - start
    return F.linear(x_ND, layer.weight + scaling * delta_ED, layer.bias)


@pytest.mark.parametrize(
    ("spec", "scaling"),
    [
        (LoRA(rank=4, alpha=8.0), 2.0),
        (LoRA(rank=4, alpha=8.0, rslora=True), 4.0),
        (LoRA(rank=9, alpha=6.0), 2 / 3),
        (LoRA(rank=9, alpha=6.0, rslora=True), 2.0),
        (LoRA(rank=1, alpha=0.5, rslora=True), 0.5),
    ],
)
def test_the_scaling_is_alpha_over_the_rank_or_over_its_root(spec, scaling):
    assert spec.scaling == pytest.approx(scaling, rel=1e-15)
    layer, adapter = one_layer(spec)
    x_ND = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for got in (layer(x_ND), torch.no_grad()(layer)(x_ND)):
        torch.testing.assert_close(got, by_the_formula(layer, adapter, x_ND, scaling), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("targets", ["all-linear", "q", "k,v", "v,q"])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (0, 7)])
def test_gradients_are_those_of_the_formula_for_any_parts_and_any_shape(targets, shape):
    spec = LoRA(rank=3, alpha=5.0, targets=targets)
    layer, adapter = one_layer(spec, of_torch=len(shape) == 3)  # ours take rows alone
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    dy = torch.randn(*shape[:-1], 20, dtype=torch.float64, generator=generator)
    wanted = [x, *adapter.parameters.values()]
    got = torch.autograd.grad(layer(x), wanted, dy)
    plain = by_the_formula(layer, adapter, x, 5 / 3)
    torch.testing.assert_close(layer(x), plain, atol=1e-12, rtol=1e-12)
    for mine, theirs in zip(got, torch.autograd.grad(plain, wanted, dy), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad


def test_what_was_not_targeted_is_the_base_bit_for_bit():
    layer, _ = one_layer(replace(RANK3, targets="k"))
    x_ND = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = (layer(x_ND) - F.linear(x_ND, layer.weight, layer.bias)).abs().amin(0) > 0
    assert change.nonzero().flatten().tolist() == list(range(*QKV["k"]))


def test_a_begins_uniform_up_to_one_over_the_root_of_the_width_and_b_at_zero():
    """40 000 draws: the mean of u is 0 within 4.4 of its standard errors and that of u^2 is 1/3 likewise; a right law
    fails in one of 45 000 seeds, and the seed is fixed."""
    layer = Linear(100, 60, False, torch.float32)
    adapter = Adapter(layer, [Site("layer", layer, {"a": (0, 30), "b": (30, 60)})], LoRA(rank=200), seed=1)
    a_RD, b_FR = adapter.parameters.values()
    u = a_RD.detach().double() * 10
    assert u.abs().max() <= 1 + 1e-6
    assert u.abs().max() > 0.999
    assert abs(u.mean()) < 4.4 * math.sqrt(1 / 3 / u.numel())
    assert abs(u.square().mean() - 1 / 3) < 4.4 * math.sqrt(4 / 45 / u.numel())
    assert not b_FR.any()
    assert len(a_RD.unique()) > 0.99 * a_RD.numel(), "two parts, or two rows, are the same draw"


def test_the_draw_of_a_part_depends_on_the_seed_and_its_name_alone():
    def drawn(seed: int, targets: str) -> dict:
        decoder = Decoder(config())
        factors = Adapter(decoder, native_sites(decoder), LoRA(rank=3, targets=targets), seed=seed).factors()
        return {name: a_RD for name, (a_RD, _) in factors.pairs.items()}

    whole, some = drawn(0, "all-linear"), drawn(0, "v_proj, up_proj")
    assert len(some) == 2 * len(config().blocks)
    assert all(torch.equal(a_RD, whole[name]) for name, a_RD in some.items())
    other = drawn(1, "all-linear")
    assert not any(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_has_learnt_nothing_is_the_base_bit_for_bit(dtype):
    decoder = filled(Decoder(config(), dtype))
    with torch.no_grad():
        learner, sampler = dense_logits(decoder), sampled(decoder)
    Adapter(decoder, native_sites(decoder), RANK3, seed=0, dtype=dtype)
    assert torch.equal(dense_logits(decoder), learner)
    assert sampled(decoder) == sampler


def test_switched_off_it_is_the_base_bit_for_bit_however_much_it_has_learnt():
    decoder = filled(Decoder(config()))
    with torch.no_grad():
        learner, sampler = dense_logits(decoder), sampled(decoder)
    adapter = adapted(decoder, RANK3)
    base = BaseDecoder(decoder, adapter)
    optimiser = torch.optim.AdamW(adapter.parameters.values(), lr=0.1)
    dense_logits(decoder).logsumexp(-1).sum().backward()
    optimiser.step()
    with torch.no_grad():
        changed = dense_logits(decoder)
        assert torch.equal(dense_logits(base), learner)
        assert sampled(base) == sampler
        assert (changed - learner).abs().max() > 0.1
        assert sampled(decoder) != sampler
        assert torch.equal(dense_logits(decoder), changed), "it was not switched on again"
        with pytest.raises(ZeroDivisionError), adapter.off():
            _ = 1 / 0
        assert torch.equal(dense_logits(decoder), changed), "an error left it off"
    assert base.branches == decoder.branches
    assert list(base.parameters()) == list(decoder.parameters())


@pytest.mark.parametrize("spec", [RANK3, replace(RANK3, rslora=True), replace(RANK3, targets="q_proj,down_proj")])
def test_merged_is_unmerged(spec):
    decoder, merged = filled(Decoder(config())), filled(Decoder(config()))
    factors = adapted(decoder, spec).factors()
    with torch.no_grad():
        for site in native_sites(merged):
            rows = [site.layer.weight[start:stop] for start, stop in site.parts.values()]
            for name, part in zip(site.parts, rows, strict=True):
                part.copy_(factors.merged(name + ".weight", part))
        base, one, other = dense_logits(filled(Decoder(config()))), dense_logits(decoder), dense_logits(merged)
    assert (one - base).abs().max() > 0.1
    torch.testing.assert_close(one, other, atol=1e-6 * float(base.abs().max()), rtol=1e-6)


def test_the_number_of_weights_is_counted_from_shapes_alone():
    for targets in ("all-linear", "k_proj,gate_proj"):
        spec = replace(RANK3, targets=targets)
        decoder = Decoder(config(), device="meta")
        counted = num_weights(lora.chosen(native_sites(decoder), spec), spec)
        assert counted == sum(p.numel() for p in adapted(filled(Decoder(config())), spec).parameters.values())


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,up_proj"])
def test_gradients_are_those_of_peft_on_the_published_model(tmp_path, targets):
    folder = their_folder(tmp_path)
    model = load(folder, dtype="fp32")
    spec = replace(RANK3, targets=targets)
    adapter = adapted(model.decoder, spec)
    theirs = peft_of(folder, adapter.factors())
    cotangent = torch.randn(*PROMPTS.shape, 51, generator=torch.Generator().manual_seed(2))
    (dense_logits(model.decoder) * cotangent).sum().backward()
    (theirs(PROMPTS).logits * cotangent).sum().backward()
    mine = adapter.factors({name: p.grad for name, p in adapter.parameters.items()}).pairs
    found = dict(theirs.named_parameters())
    compared = 0
    for name, pair in mine.items():
        for end, grad in zip(("lora_A", "lora_B"), pair, strict=True):
            expected = found[f"base_model.model.{name}.{end}.default.weight"].grad
            torch.testing.assert_close(grad, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4, msg=name)
            compared += 1
    assert compared == sum("lora" in name for name in found)


class Foreign(nn.Module):
    """A model of transformers with nothing of ours in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_layers_of_torch_are_adapted_as_ours_are(tmp_path):
    """The same folder loaded by transformers and by us, an adapter of the same seed on each: logits and gradients."""
    import transformers

    folder = their_folder(tmp_path)
    model = load(folder, dtype="fp32")
    theirs = Foreign(transformers.AutoModelForCausalLM.from_pretrained(folder))
    sites = linear_sites(theirs.model, theirs.model.get_output_embeddings())
    pairs = []
    for decoder, found in ((model.decoder, native_sites(model.decoder)), (theirs, sites)):
        adapter = Adapter(decoder, found, RANK3, seed=4)
        with torch.no_grad():
            for name, (_, b_ER) in adapter.factors().pairs.items():
                b_ER.fill_(0.05 if "q_proj" in name else -0.02)
        logits = dense_logits(decoder) if decoder is model.decoder else theirs.model(PROMPTS).logits
        logits.logsumexp(-1).sum().backward()
        grads = adapter.factors({name: p.grad for name, p in adapter.parameters.items()}).pairs
        pairs.append({"logits": logits.detach()} | {f"{n} {e}": g for n, p in grads.items() for e, g in zip("AB", p, strict=True)})  # fmt: skip  # noqa: E501
    assert {name.rpartition(".")[2] for site in sites for name in site.parts} == set(NAMES)
    assert pairs[0].keys() == pairs[1].keys()
    for name, value in pairs[0].items():
        torch.testing.assert_close(value, pairs[1][name], atol=2e-5 * float(value.abs().max()), rtol=1e-4, msg=name)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 2, 8, 64])
@torch.inference_mode()
def test_kept_blocks_and_the_kernel_of_one_row_stay_right_under_an_adapter(rows):
    """The base's product first, as it is without an adapter, then the adapter's; and a changed B is seen at once."""
    with torch.inference_mode(False):
        layer, adapter = one_layer(RANK3, {"q": (0, 96), "k": (96, 160)}, 96, 160, torch.bfloat16)
    x_ND = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    a_RD, b_FR = adapter.parameters.values()
    for use in range(PACK_AFTER + 3):
        if use == PACK_AFTER + 2:
            b_FR.mul_(-2)
        with adapter.off():
            y_NE = layer(x_ND)
        for part, (start, stop) in enumerate(((0, 96), (96, 160))):
            h_NR = x_ND @ a_RD[3 * part : 3 * part + 3].T
            expected = y_NE[:, start:stop].float() + 5 / 3 * h_NR.float() @ b_FR[start:stop].float().T
            torch.testing.assert_close(layer(x_ND)[:, start:stop].float(), expected, atol=0.02, rtol=0.01)
    assert (layer.kept.blocks is not None) == (rows > 1)


def test_a_token_of_the_learner_keeps_only_a_x_more_than_without_an_adapter():
    """Bytes that the forward pass holds for the backward pass, weights aside."""

    def held(decoder: Decoder, length: int) -> int:
        weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
        found: dict[int, int] = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = decoder(torch.arange(length) % 51, Layout.chain(length))
        assert hidden.requires_grad
        return sum(found.values())

    def per_token(decoder: Decoder) -> float:
        return (held(decoder, 96) - held(decoder, 32)) / 64

    plain = filled(Decoder(config()))
    decoder = filled(Decoder(config()))
    adapter = adapted(decoder, RANK3)
    ranks = 3 * sum(len(site.parts) for site in adapter.sites)
    # nothing before the first adapter learns: the embedding keeps no id, and the first norm not what it was given
    assert per_token(decoder) == per_token(plain) + 4 * ranks - 8 - 4 * config().width


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=-1), r"lora\.rank must be at least 1, or 0 for no adapter; got -1"),
        (lambda: LoRA(rank=2, alpha=0.0), r"lora\.alpha must be a positive number, not 0\.0"),
        (lambda: LoRA(rank=2, alpha=math.inf), r"lora\.alpha must be a positive number, not inf"),
        (lambda: adapted(Decoder(config()), LoRA()), r"needs lora\.rank of at least 1; got 0"),
        (lambda: adapted(Decoder(config()), replace(RANK3, targets="q_prj")), r"'q_prj'.*Did you mean 'q_proj'\?"),
        (lambda: adapted(Decoder(config()), replace(RANK3, targets="q_proj,")), r"names ''.*Known: all-linear, down"),
        (lambda: adapted(Decoder(config()), replace(RANK3, targets="lm_head")), r"'lm_head'.*no such linear layer"),
        (lambda: lora.chosen([], RANK3), r"no linear layer that LoRA could stand beside"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_neither_embedding_nor_head_is_adapted():
    decoder = Decoder(replace(config(), tied=False))
    sites = native_sites(decoder)
    assert {name.rpartition(".")[2] for site in sites for name in site.parts} == set(NAMES)
    layers = [module for module in decoder.modules() if isinstance(module, Linear)]
    assert {id(site.layer) for site in sites} == {id(layer) for layer in layers} - {id(decoder.unembedding)}
