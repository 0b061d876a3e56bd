"""Options in words, and the objects that they stand for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fxopt.errors import FxoptError, UnknownNameError

if TYPE_CHECKING:
    from fxopt._cli.options import Options
    from fxopt.evaluate import Reconstruction
    from fxopt.objectives import Objective
    from fxopt.training import Distillation, FineTuning

__all__ = ["fine_tuning_of", "objective_of", "reconstruction_of"]

_SCORE, _NONE = "score", "none"
_WAYS = ("sequential", "moments", _NONE)
_TERMS = ("logits", "temperature", "features", "attention")


def objective_of(text: str | None) -> Objective | None:
    """What ``"score"`` or ``"macs@0.97"`` asks to search for; None for the best score.

    Raises:
        FxoptError: If the text has another form, the score is no accuracy, or there is no such metric.
    """
    from fxopt.objectives import SmallestCost

    if text is None or text == _SCORE:
        return None
    match = re.fullmatch(r"(?P<metric>[\w-]+)@(?P<score>[0-9.]+%?)", text.replace(" ", ""))
    if match is None:
        raise FxoptError(
            f"Objective {text!r} is neither {_SCORE!r} nor METRIC@SCORE; macs@0.97 asks for the smallest MACs that "
            "keep a score of 0.97."
        )
    return SmallestCost(_number(match["score"], f"The score of objective {text!r}"), match["metric"])


def reconstruction_of(text: str | None) -> bool | Reconstruction:
    """How weights behind cut channels are found anew: ``"sequential"``, ``"moments"`` or ``"none"``.

    Raises:
        UnknownNameError: If there is no such way.
    """
    from fxopt.evaluate import Reconstruction

    if text is not None and text not in _WAYS:
        raise UnknownNameError("way to reconstruct", text, _WAYS)
    return Reconstruction(sequential=False) if text == "moments" else text != _NONE


def fine_tuning_of(options: Options) -> FineTuning | None:
    """How to fine-tune; None if nothing is said about it.

    Raises:
        FxoptError: If an option is unknown or out of range.
    """
    from fxopt.training import EarlyStop, FineTuning

    said = {
        name: value for name in ("optimizer", "schedule", "scales") if (value := getattr(options, name)) is not None
    }
    if not said and options.patience is None and options.distill is None:
        return None
    # With a loss of one's own there may be no class scores to learn.
    whole = None if options.loss is not None and options.distill is None else _distillation(options.distill)
    stop = None if options.patience is None else EarlyStop(options.patience)
    return FineTuning(**said, distillation=whole, early_stop=stop)


def _distillation(text: str | None) -> Distillation | None:
    """``"logits=0.5,attention=1"`` as an object; what is not named is not learnt."""
    from fxopt.training import Distillation

    if text is None:
        return Distillation()
    if text == _NONE:
        return None
    found = {"logits": 0.0}
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if name not in _TERMS:
            raise UnknownNameError("term to distill", name, (*_TERMS, _NONE))
        if not sign:
            raise FxoptError(f"Term {part!r} to distill has no weight; write {name}=0.5.")
        found[name] = _number(value, f"The weight of {name!r} to distill")
    return Distillation(**found)  # type: ignore[arg-type]


def _number(text: str, what: str) -> float:
    try:
        return float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
    except ValueError as failure:
        raise FxoptError(f"{what} is {text!r}; give a number, such as 0.5.") from failure
