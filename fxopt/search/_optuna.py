"""Optuna's samplers as an engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search._engine import FAILED, Engine
from fxopt.search._ladders import ladders

if TYPE_CHECKING:
    import optuna

__all__ = ["OptunaEngine"]

SAMPLERS = ("tpe", "cmaes", "gp", "nsga2", "random")


class OptunaEngine(Engine):
    """Proposes what a sampler of Optuna suggests, projected to the constraint.

    Every axis of a decision is an integer parameter of an Optuna study, the rung on its ladder. What was suggested and
    what was made of it to meet the budget are both in the trial: the sampler learns from the suggestion, the user
    attribute ``policy`` holds the policy that was scored. With a ``storage`` the trials appear in Optuna's dashboard
    while the search runs.

    With ``nsga2`` the study has two values, the score to raise and the cost relative to its limit to lower, so that
    ``study.best_trials`` is a Pareto front; without a constraint, the score alone.

    The state is the list of trials: another engine is brought to the same place by telling it all of them again.

    Args:
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: The seed of the sampler.
        sampler: ``"tpe"``, ``"cmaes"`` (needs the package cmaes), ``"gp"`` (needs torch), ``"nsga2"`` or ``"random"``.
        storage: The storage of the study, as Optuna takes it, such as ``"sqlite:///study.db"``; None for memory.
        study: The name of the study in the storage; one that is there already is not continued.

    Attributes:
        study: The Optuna study.

    Raises:
        SearchError: If Optuna or what the sampler needs is not installed, the sampler is unknown, or the storage
            refuses the study.
    """

    name = "optuna"

    def __init__(
        self,
        space: SearchSpace,
        constraint: Constraint | None = None,
        seed: int = 0,
        *,
        sampler: str = "tpe",
        storage: str | None = None,
        study: str | None = None,
    ) -> None:
        super().__init__(space, constraint, seed)
        if sampler not in SAMPLERS:
            raise SearchError(f"There is no Optuna sampler {sampler!r} here; known: {', '.join(SAMPLERS)}.")
        self.sampler = sampler
        self.storage = storage
        self.study_name = study
        self._ladders = ladders(space, constraint)
        self._optuna = _import_optuna()
        self._two_values = sampler == "nsga2" and constraint is not None
        self._sampler_seed = self.seed
        self.study = self._make_study()
        self._open: list[tuple[Policy, Any]] = []
        self._log: list[list[Any]] = []

    @property
    def options(self) -> dict[str, Any]:
        """Sampler, storage and name of the study."""
        return {"sampler": self.sampler, "storage": self.storage, "study": self.study_name}

    def propose(self, n: int) -> Sequence[Policy]:
        """Ask the sampler ``n`` times."""
        proposed = []
        with _quiet():
            for _ in range(n):
                policy, trial = self._suggested()
                self._open.append((policy, trial))
                self._log.append(["ask"])
                proposed.append(policy)
        return proposed

    def observe(self, policy: Policy, score: float) -> None:
        """Tell the study."""
        place = next(i for i, (other, _) in enumerate(self._open) if other == policy)
        self._log.append(["tell", place, None if score == FAILED else score])
        with _quiet():
            self._told(place, score)

    def extra_state(self) -> dict[str, Any]:
        """What was asked and told, in order."""
        return {"seed": self._sampler_seed, "log": [list(entry) for entry in self._log]}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Ask and tell all of it again.

        Raises:
            SearchError: If trials were asked of this engine before.
        """
        if self._log:
            raise SearchError("The state of an Optuna engine is loaded into a fresh engine; create another.")
        self._sampler_seed = int(state["seed"])
        with _quiet():
            self.study.sampler = self._make_sampler()
            for entry in state["log"]:
                if entry[0] == "ask":
                    self._open.append(self._suggested())
                else:
                    self._told(int(entry[1]), FAILED if entry[2] is None else float(entry[2]))
                self._log.append(list(entry))

    def _suggested(self) -> tuple[Policy, Any]:
        trial = self.study.ask()
        row = [self._choice(trial, j) for j in range(len(self.space))]
        policy = self.project([self.space.decode(row)])[0]
        trial.set_user_attr("policy", json.dumps(policy.to_data()))
        return policy, trial

    def _choice(self, trial: Any, j: int) -> int:
        decision, ladder = self.space[j], self._ladders[j]
        names = [f"{decision.kind} {decision.site}"]
        if len(ladder.sizes) > 1:
            names = [f"{names[0]} {part}" for part in ("first", "second")]
        rungs = [trial.suggest_int(name, 0, size - 1) for name, size in zip(names, ladder.sizes, strict=True)]
        return int(ladder.choice_at[tuple(rungs)])

    def _told(self, place: int, score: float) -> None:
        policy, trial = self._open.pop(place)
        if score == FAILED:
            self.study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        elif self._two_values and self.constraint is not None:
            cost = float((self.constraint.costs([policy]) / self.constraint.limits).max())
            self.study.tell(trial, [score, cost])
        else:
            self.study.tell(trial, score)

    def _make_study(self) -> optuna.Study:
        directions = ["maximize", "minimize"] if self._two_values else ["maximize"]
        try:
            with _quiet():
                made = self._optuna.create_study(
                    storage=self.storage,
                    sampler=self._make_sampler(),
                    study_name=self.study_name,
                    directions=directions,
                )
        except ImportError as failure:
            raise SearchError(
                f"Optuna's sampler {self.sampler!r} needs a package that is not installed: {failure}. "
                f"Run: pip install 'fxopt[optuna]' {_PACKAGES.get(self.sampler, '')}"
            ) from failure
        except Exception as failure:
            raise SearchError(
                f"Optuna refuses the study {self.study_name!r} in the storage {self.storage!r}: {failure}. "
                "Give another name, or the storage of a study that is new."
            ) from failure
        study: optuna.Study = made
        return study

    def _make_sampler(self) -> Any:
        samplers = self._optuna.samplers
        if self.sampler == "tpe":
            return samplers.TPESampler(seed=self._sampler_seed, multivariate=True)
        made = {
            "cmaes": samplers.CmaEsSampler,
            "gp": samplers.GPSampler,
            "nsga2": samplers.NSGAIISampler,
            "random": samplers.RandomSampler,
        }
        return made[self.sampler](seed=self._sampler_seed)


_PACKAGES = {"cmaes": "cmaes", "gp": "torch"}


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as failure:
        raise SearchError(
            f"The engine 'optuna' needs Optuna ({failure}). Run: pip install 'fxopt[optuna]'"
        ) from failure
    return optuna


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna draws from numpy's global generator in places, warns of what is experimental, and logs each study."""
    import warnings

    import optuna

    before = optuna.logging.get_verbosity()
    drawn = np.random.get_state()  # noqa: NPY002 - kept as it is for whoever uses it
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
        np.random.set_state(drawn)  # noqa: NPY002
