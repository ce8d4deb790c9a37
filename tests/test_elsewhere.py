"""The simulated device: values are the CPU's, mixing is refused, crossings are counted, gradients flow."""

import copy

import pytest
import torch
from elsewhere import DEVICE, elsewhere
from torch import nn


def test_an_operation_gives_the_cpus_values_and_stays_on_the_device():
    here = torch.linspace(-1, 1, 6).view(2, 3)
    with elsewhere():
        there = here.to(DEVICE)
        out = (there @ there.T).softmax(-1)
        assert out.device == DEVICE
        assert torch.equal(out.cpu(), (here @ here.T).softmax(-1))


def test_host_and_device_do_not_mix_but_for_numbers_and_indices():
    with elsewhere() as traffic:
        there = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="of the device and of the host"):
            there + torch.ones(3)
        assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]
        assert there[torch.tensor([0, 2])].shape == (2,)
        assert traffic.host_indices == 1


def test_every_wait_of_the_host_is_counted():
    with elsewhere() as traffic:
        there = torch.tensor([1.0, 0.0], device=DEVICE)
        assert (traffic.up, traffic.down) == (1, 0)
        for number, wait in enumerate((float, bool, lambda t: t.tolist(), torch.Tensor.cpu, torch.nonzero), 1):
            wait(there[0] if wait in (float, bool) else there)
            assert traffic.down == number
        there[there > 0]
        assert traffic.down == 6


def test_in_place_changes_reach_views_and_what_they_are_views_of():
    with elsewhere():
        there = torch.zeros(2, 2, device=DEVICE)
        there[1].add_(1)
        there.view(-1)[0] = 5
        assert there.tolist() == [[5, 0], [1, 1]]


def test_a_module_learns_on_the_device_as_it_does_on_the_host():
    def trained(device: torch.device) -> torch.Tensor:
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(6.0).view(2, 3) / 7)
            layer.bias.zero_()
        layer = copy.deepcopy(layer.to(device))
        adam = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            layer(torch.linspace(0, 1, 12, device=device).view(4, 3)).square().sum().cpu().backward()
            adam.step()
            adam.zero_grad()
        return layer.weight.detach().cpu()

    with elsewhere():
        there = trained(DEVICE)
    assert torch.equal(there, trained(torch.device("cpu")))


def test_data_of_a_parameter_can_change_its_precision():
    with elsewhere():
        parameter = nn.Parameter(torch.ones(2, device=DEVICE) / 3)
        parameter.data = parameter.detach().to(torch.bfloat16)
        assert parameter.dtype == torch.bfloat16
        (parameter * 2).sum().backward()
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.tolist() == (torch.ones(2) / 3).bfloat16().tolist()
