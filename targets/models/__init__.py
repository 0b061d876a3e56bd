"""Families of cost models, a compiled module each.

A module defines ``PARAMETERS`` (dotted name to :class:`fxopt.targets.parameters.Parameter`: what a preset gives) and
``Model(values, fuses)``, a subclass of ``CostModel`` that overrides ``cost``. A preset names the module as its
family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Protocol, cast

from fxopt.errors import UnknownNameError
from fxopt.targets._core import CostModel
from fxopt.targets.parameters import Parameter

__all__ = ["Family", "families", "family"]


class Family(Protocol):
    """What a module of this package provides."""

    PARAMETERS: Mapping[str, Parameter]

    def Model(self, values: Mapping[str, float], fuses: bool) -> CostModel:
        """Make a model of the figures ``values``, in SI units."""
        ...


def families() -> list[str]:
    """Names of all families that presets can name."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def family(name: str) -> Family:
    """The family called ``name``.

    Raises:
        UnknownNameError: If there is none.
    """
    if name not in families():
        raise UnknownNameError("family of cost models", name, families())
    return cast("Family", importlib.import_module(f"{__name__}.{name}"))
