"""Seeds decide what is drawn, and leave no trace."""

from __future__ import annotations

import warnings

import pytest
import torch

from fxopt._seeding import seeded


def test_a_seed_decides_and_leaves_the_callers_numbers_as_they_were() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(4)
    torch.manual_seed(7)
    with seeded(1):
        one = torch.rand(4)
    with pytest.raises(ValueError, match="within"), seeded(1):
        assert torch.equal(torch.rand(4), one)
        raise ValueError("within")
    with seeded(2):
        assert not torch.equal(torch.rand(4), one)
    assert torch.equal(torch.rand(4), wanted)


def test_several_devices_are_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {0: torch.zeros(1), 1: torch.ones(1)}
    left: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: left.update({device: state}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with seeded(0):
            pass
    assert left == states
