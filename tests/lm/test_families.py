"""Every family is the one of `transformers`: logits and gradients, folders byte by byte, and what is refused."""

import json

import pytest
import torch
from family_twins import KINDS, VOCABULARY, folder_of, in_fp64, their_model

from rung.core.records import Layout
from rung.lm.weights.hf import load_folder, save_folder
from rung.lm.weights.names import hugging_face_names, rules

transformers = pytest.importorskip("transformers")

SEQUENCE = 23  # some windows long


def tokens(rows: int = 2, length: int = SEQUENCE) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits_and_gradients(theirs, ours, table, tolerance):
    tokens_BT = tokens()
    generator = torch.Generator().manual_seed(2)
    expected_BTV = theirs(tokens_BT).logits
    weight_BTV = torch.randn(expected_BTV.shape, generator=generator, dtype=expected_BTV.dtype)
    (expected_BTV.log_softmax(-1) * weight_BTV).sum().backward()
    hidden_TD = ours(tokens_BT.flatten(), Layout.chains([SEQUENCE] * 2))
    logits_BTV = ours.head(hidden_TD).view_as(expected_BTV)
    (logits_BTV.log_softmax(-1) * weight_BTV).sum().backward()

    assert expected_BTV.std() > 0.3  # else an absolute tolerance would say nothing
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=tolerance, atol=tolerance)
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == {rule.ours for rule in table}
    for rule in table:
        gradient = torch.cat([theirs.get_parameter(part.name).grad for part in rule.parts])
        scale = gradient.abs().max()
        assert scale > 0, rule
        got = parameters[rule.ours].grad
        torch.testing.assert_close(got / scale, gradient / scale, rtol=0, atol=tolerance, msg=rule.ours)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_all_gradients_equal_transformers(tmp_path, kind):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        theirs = their_model(kind, dtype)
        ours, folder = load_folder(folder_of(theirs, tmp_path / str(dtype)))
        table = rules(ours.config, hugging_face_names(folder.config))
        if dtype == torch.float64:
            with in_fp64(theirs):
                assert_same_logits_and_gradients(theirs, ours, table, tolerance)
        else:
            assert_same_logits_and_gradients(theirs, ours, table, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_saved_back_byte_for_byte_and_transformers_reads_it(tmp_path, kind):
    theirs = their_model(kind)
    path = folder_of(theirs, tmp_path / "theirs")
    ours, folder = load_folder(path)
    save_folder(tmp_path / "ours", folder, ours.config, dict(ours.named_parameters()))
    names = sorted(file.name for file in path.iterdir())
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (path / name).read_bytes(), name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)
