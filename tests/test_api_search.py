"""The search of the one call: interrupted and gone on with, and with its trials elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fxopt.api import OptimizationResult
from fxopt.errors import (
    JournalError,
    SearchError,
)
from fxopt.search import read_journal
from tests.optimizing import DATA, InProcess, Stopping, half_right, make_net, optimize, outcome

# Interrupted, and gone on with.


def searched(folder: Path, judge: Callable[[nn.Module], float], **options: Any) -> OptimizationResult:
    known = {"budget": {"macs": 0.6}, "trials": 6, "train": DATA, "evaluate": judge, "workdir": folder}
    return optimize(**(known | options))


@pytest.mark.parametrize("at", [3, 6, 8])
def test_a_search_that_was_interrupted_ends_as_if_it_had_not_been(at: int, tmp_path: Path) -> None:
    whole = searched(tmp_path / "whole", Stopping())
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "cut", Stopping(at))
    assert outcome(searched(tmp_path / "cut", Stopping())) == outcome(whole)


def test_a_journal_that_was_cut_in_a_line_is_gone_on_with(tmp_path: Path) -> None:
    whole = searched(tmp_path, half_right)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    for path in tmp_path.glob("fine-tune*"):
        path.unlink()
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:25])
    assert outcome(searched(tmp_path, half_right)) == outcome(whole)
    assert journal.read_bytes().count(b"\n") == 7


def test_fine_tuning_is_not_begun_anew(tmp_path: Path) -> None:
    first = searched(tmp_path, half_right, passes=("prune-channels",))
    (checkpoint,) = tmp_path.glob("fine-tune*")
    stamp = checkpoint.stat().st_mtime_ns
    assert outcome(searched(tmp_path, half_right, passes=("prune-channels",))) == outcome(first)
    assert checkpoint.stat().st_mtime_ns == stamp


def test_more_trials_extend_a_search(tmp_path: Path) -> None:
    searched(tmp_path, half_right, trials=3)
    extended = searched(tmp_path, half_right, trials=6)
    assert extended.search is not None
    assert (extended.search.resumed, len(extended.search.trials)) == (3, 6)
    assert outcome(extended) == outcome(searched(tmp_path / "fresh", half_right, trials=6))


@pytest.mark.parametrize("engine", ["evolution", "ddpg", "exact"])
def test_engines_have_options_that_fit_the_trials_which_a_search_goes_on_with(engine: str, tmp_path: Path) -> None:
    def options(trials: int, folder: str = "one") -> Any:
        result = searched(
            tmp_path / folder, half_right, engine=engine, trials=trials, passes=("prune-channels",), epochs=0
        )
        assert result.search is not None
        header, found = read_journal(tmp_path / folder / "journal.jsonl")
        assert [trial.policy for trial in result.search.trials] == [trial.policy for trial in found]
        return header["options"]

    few = options(4)
    assert options(40) == few
    assert options(40, "another") != few


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 in the journal, 1 now"),
        ({"budget": {"macs": 0.7}}, "constraint"),
        ({"engine": "random"}, "engine"),
        ({"target": "v100"}, "target"),
        (
            {"model": make_net().apply(lambda one: getattr(one, "bias", None) is not None and one.bias.data.add_(1))},
            "model",
        ),
        ({"evaluate": None, "val": DATA}, "judge"),
    ],
)
def test_the_journal_of_another_search_is_left_alone(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    searched(tmp_path, half_right, trials=1, epochs=0)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(JournalError, match="another search") as caught:
        searched(tmp_path, change.pop("evaluate", half_right), trials=1, epochs=0, **change)
    assert named in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_a_working_folder_that_cannot_be_written_is_told_before_any_trial(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    judge = Stopping()
    with pytest.raises(JournalError, match=r"Cannot write .*file/inside"):
        searched(tmp_path / "file" / "inside", judge)
    assert judge.calls == 0


# Trials elsewhere.


def test_threads_give_what_no_executor_gives() -> None:
    alone = optimize(budget={"macs": 0.6}, train=DATA, val=DATA, trials=6, parallel=3)
    with ThreadPoolExecutor(2) as pool:
        assert outcome(optimize(budget={"macs": 0.6}, train=DATA, val=DATA, trials=6, parallel=3, executor=pool)) == (
            outcome(alone)
        )


@pytest.mark.parametrize("judge", [{"val": DATA}, {"evaluate": half_right}, {}])
def test_what_crosses_to_processes_scores_the_same(judge: dict[str, Any]) -> None:
    options = {"budget": {"macs": 0.6}, "trials": 4, "parallel": 2, **judge}
    pool = InProcess()
    assert outcome(optimize(executor=pool, **options)) == outcome(optimize(**options))
    assert pool.sent > 1


def test_what_cannot_leave_the_process_is_told() -> None:
    with pytest.raises(SearchError, match=r"cannot go to other processes.*executor of threads"):
        optimize(budget={"macs": 0.6}, evaluate=lambda module: half_right(module), executor=InProcess())
