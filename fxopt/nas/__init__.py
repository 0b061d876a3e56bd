"""Search of operators by a supernet: train all candidates at once, and derive the best network for a target."""

from __future__ import annotations

from fxopt.nas._architecture import BinaryGates, Reinforce, Relaxed
from fxopt.nas._batches import split
from fxopt.nas._choose import PathScore, check_budget, fine_tune, policy_within
from fxopt.nas._objective import Cost, CostTerm, ExpectedCost
from fxopt.nas._settings import Epoch, SupernetSettings
from fxopt.nas._supernet import MixedOperator, Supernet
from fxopt.nas._train import SupernetResult, train_supernet

__all__ = [
    "BinaryGates",
    "Cost",
    "CostTerm",
    "Epoch",
    "ExpectedCost",
    "MixedOperator",
    "PathScore",
    "Reinforce",
    "Relaxed",
    "Supernet",
    "SupernetResult",
    "SupernetSettings",
    "check_budget",
    "fine_tune",
    "policy_within",
    "split",
    "train_supernet",
]
