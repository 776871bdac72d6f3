"""Figures of the updates of a step."""

import math

import pytest
import torch

from taurl.llm.algorithms.figures import Tally


def test_means_are_over_the_masked_tokens_of_all_parts():
    tally = Tally()
    assert tally.means() == {}
    mask = torch.tensor([[True, False, False], [True, True, False]])
    values = torch.tensor([[1.0, math.nan, math.nan], [2.0, 4.0, math.inf]], requires_grad=True)
    tally.add(mask, {"entropy": values, "clipped": values.detach() > 1})
    tally.add(torch.ones(2, dtype=torch.bool), {"entropy": torch.tensor([0.5, 0.5], dtype=torch.bfloat16)})
    tally.add(torch.zeros(1, 2, dtype=torch.bool), {"kl": torch.ones(1, 2)})
    assert tally.means() == pytest.approx({"entropy": 8 / 5, "clipped": 2 / 3, "kl": 0.0}, rel=1e-15)


def test_means_are_read_from_the_device_only_when_they_are_asked_for(monkeypatch):
    tally = Tally()
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the device was waited for"))
        for _ in range(3):
            tally.add(torch.tensor([[True, False]]), {"entropy": torch.tensor([[1.5, 2.5]])})
    assert tally.means() == {"entropy": 1.5}
