"""What whoever extends fxopt needs for their tests: a conformance suite for every kind of plug-in.

Subclass a suite in a test module and say what to test; pytest collects the rest. The names are imported
lazily, so that the tests of an engine load no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxopt._named import lazily

if TYPE_CHECKING:
    from fxopt.testing._engines import EngineConformance as EngineConformance
    from fxopt.testing._equivalence import assert_equivalent as assert_equivalent
    from fxopt.testing._passes import PassConformance as PassConformance
    from fxopt.testing._passes import TunablePassConformance as TunablePassConformance
    from fxopt.testing._targets import TargetConformance as TargetConformance

_LAZY = {
    "EngineConformance": "fxopt.testing._engines",
    "PassConformance": "fxopt.testing._passes",
    "TunablePassConformance": "fxopt.testing._passes",
    "TargetConformance": "fxopt.testing._targets",
    "assert_equivalent": "fxopt.testing._equivalence",
}

__all__ = ["EngineConformance", "PassConformance", "TargetConformance", "TunablePassConformance", "assert_equivalent"]

__getattr__, __dir__ = lazily(__name__, _LAZY, __all__)
