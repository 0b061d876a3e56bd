"""A trained network and its data, for the command line.

`fxopt optimize --recipe examples/digits.toml` and `fxopt profile examples/digits.py:untrained --target pixel1`.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from fxopt import data
from fxopt.models import small_mobilenet_v2
from fxopt.training import fit


@functools.cache
def loaders() -> tuple[data.TensorLoader, data.TensorLoader]:
    return data.digits()


def train() -> data.TensorLoader:
    return loaders()[0]


def val() -> data.TensorLoader:
    return loaders()[1]


def untrained() -> tuple[nn.Module, torch.Tensor]:
    return small_mobilenet_v2(), next(iter(val()))[0][:2]


def trained() -> tuple[nn.Module, torch.Tensor]:
    model, example = untrained()
    fit(model, train(), epochs=8, learning_rate=0.05)
    return model, example
