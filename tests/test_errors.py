"""The error tree: one root, and names that come with a suggestion."""

from __future__ import annotations

import inspect
import pickle  # noqa: TID251 (pools of processes pickle what is raised in them)

import pytest

from fxopt import errors
from fxopt.errors import FxoptError, InfeasibleError, JournalError, SearchError, UnknownNameError, VerifyError

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]


def test_every_error_is_public_and_has_the_root() -> None:
    assert {error.__name__ for error in CLASSES} == set(errors.__all__)
    assert all(issubclass(error, FxoptError) and error.__doc__ for error in CLASSES)


def test_no_error_shadows_a_builtin() -> None:
    builtins = __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__)
    assert not set(errors.__all__) & set(builtins)


def test_a_journal_error_is_a_search_error() -> None:
    assert issubclass(JournalError, SearchError)
    assert issubclass(errors.UnsupportedError, errors.TargetError)
    assert issubclass(errors.ParityError, errors.ExportError)


@pytest.mark.parametrize(
    ("name", "suggestion"), [("evolutoin", "evolution"), ("Greedy", "greedy"), ("zzz", None), ("", None)]
)
def test_an_unknown_name_suggests_the_nearest(name: str, suggestion: str | None) -> None:
    error = UnknownNameError("search engine", name, iter(["greedy", "evolution"]))
    assert error.name == name
    assert error.suggestion == suggestion
    assert f"Unknown search engine {name!r}." in str(error)
    assert ("Did you mean" in str(error)) is (suggestion is not None)
    assert str(error).endswith("Known: evolution, greedy.")


def test_an_unknown_name_where_none_is_known() -> None:
    assert str(UnknownNameError("target", "pixel", [])).endswith("Known: none.")


def test_infeasible_carries_its_numbers() -> None:
    error = InfeasibleError("over", metric="latency", limit=0.5, least=0.7)
    assert (error.metric, error.limit, error.least) == ("latency", 0.5, 0.7)
    assert str(error) == "over"


MADE: list[FxoptError] = [
    *(error("it is so; do this") for error in CLASSES if error is not UnknownNameError),
    InfeasibleError("over", metric="latency", limit=0.5, least=0.7),
    VerifyError("broken", node="conv"),
    UnknownNameError("search engine", "evolutoin", ["greedy", "evolution"]),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_errors_come_back_from_other_processes(error: FxoptError) -> None:
    restored = pickle.loads(pickle.dumps(error))
    assert type(restored) is type(error)
    assert str(restored) == str(error)
    assert vars(restored) == vars(error)


def test_an_error_of_ones_own_with_any_constructor_can_be_pickled() -> None:
    restored = pickle.loads(pickle.dumps(OwnError(1, two="2")))
    assert (str(restored), restored.two) == ("1 and 2", "2")


class OwnError(FxoptError):
    def __init__(self, one: int, *, two: str) -> None:
        super().__init__(f"{one} and {two}")
        self.two = two
