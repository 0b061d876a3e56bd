"""What can be decided about a model, what was decided, and what it may cost; no torch in here.

A :class:`Decision` is one thing to choose, a :class:`SearchSpace` all of them, a :class:`Policy` the
choices made. A :class:`Budget` says what the result may cost, and a :class:`Constraint` keeps every
policy within it.
"""

from __future__ import annotations

from fxopt.decisions._additive import AdditiveCosts
from fxopt.decisions._bits import FLOAT_BITS
from fxopt.decisions._budget import METRICS, Budget, format_quantity, format_score
from fxopt.decisions._constraint import Constraint
from fxopt.decisions._decision import Capabilities, Choice, Decision, Key
from fxopt.decisions._placement import PLAIN_PLACEMENT, Placement, operator_key
from fxopt.decisions._policy import POLICY_SCHEMA, Policy
from fxopt.decisions._shares import Shares
from fxopt.decisions._space import SearchSpace

__all__ = [
    "FLOAT_BITS",
    "METRICS",
    "PLAIN_PLACEMENT",
    "POLICY_SCHEMA",
    "AdditiveCosts",
    "Budget",
    "Capabilities",
    "Choice",
    "Constraint",
    "Decision",
    "Key",
    "Placement",
    "Policy",
    "SearchSpace",
    "Shares",
    "format_quantity",
    "format_score",
    "operator_key",
]
