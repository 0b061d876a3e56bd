"""Running searches: trials, failures, executors, the journal and resuming."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fxopt.decisions import Constraint, Decision, Policy, SearchSpace
from fxopt.errors import JournalError, PassError, SearchError, UnknownNameError
from fxopt.search import FAILED, Engine, SearchProgress, SearchResult, Trial, engines, read_journal, run_search

SPACE = SearchSpace([Decision("channels", f"conv{i}", tuple(range(4, 33, 4)), 32) for i in range(5)])
BEST = SPACE.decode([1, 6, 3, 2, 4])
NAMES = ["uniform", "random", "greedy", "evolution"]


def score(policy: Policy) -> float:
    return -float(np.abs(SPACE.encode(policy) - SPACE.encode(BEST)).sum())


def make(name: str = "evolution", seed: int = 0, limit: float = 100.0) -> Engine:
    def cost(batch: object) -> object:
        return np.array([float(sum(policy.values())) for policy in batch])  # type: ignore[attr-defined]

    return engines.create(name, SPACE, Constraint(SPACE, cost, limit, ["size"]), seed)  # type: ignore[arg-type]


class Counted:
    """An evaluation that counts its calls and can be made to break at one of them."""

    def __init__(self, breaks_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls = 0
        self.breaks_at = breaks_at
        self.error = error

    def __call__(self, policy: Policy) -> float:
        if self.calls == self.breaks_at and self.error is not None:
            raise self.error
        self.calls += 1
        return score(policy)


# Results.


def test_it_returns_the_best_of_all_trials() -> None:
    result = run_search(make(seed=5), score, 60)
    assert len(result.trials) == 60
    assert [trial.number for trial in result.trials] == list(range(60))
    assert result.score == max(score(trial.policy) for trial in result.trials)
    assert result.policy == result.best.policy
    assert result.best == next(trial for trial in result.trials if trial.score == result.score), "the first of equals"
    assert (result.engine, result.seed, result.stopped, result.resumed) == ("evolution", 5, "trials", 0)
    assert result.curve == tuple(np.maximum.accumulate([trial.score for trial in result.trials]))


def test_an_engine_that_has_nothing_left_ends_the_search() -> None:
    result = run_search(make("uniform"), score, 1000)
    assert result.stopped == "exhausted"
    assert len(result.trials) < 30


def test_patience_ends_the_search() -> None:
    result = run_search(make("random"), score, 1000, patience=10)
    assert result.stopped == "patience"
    assert len(result.trials) == result.best.number + 1 + 10


@pytest.mark.parametrize("threads", [0, 2])
def test_repeated_policies_are_evaluated_once(threads: int) -> None:
    small = SearchSpace([Decision("channels", "conv", (8, 16), 16)])
    calls: list[Policy] = []

    def evaluate(policy: Policy) -> float:
        calls.append(policy)
        if policy["channels", "conv"] == 16:
            raise PassError("no")
        return 1.0

    with ThreadPoolExecutor(2) as pool:
        executor = pool if threads else None
        result = run_search(engines.create("random", small), evaluate, 20, parallel=3, executor=executor)
    assert len(result.trials) == 20
    assert len(calls) == len(set(calls)) == result.evaluations == 2
    assert {trial.score for trial in result.trials} == {1.0, None}
    assert sum(trial.cached for trial in result.trials) == 18


def test_progress_is_told_after_each_trial() -> None:
    told: list[SearchProgress] = []
    result = run_search(make(), score, 10, progress=told.append)
    assert [one.trial for one in told] == list(result.trials)
    assert [one.done for one in told] == list(range(1, 11))
    assert {one.trials for one in told} == {10}
    assert [None if one.best is None else one.best.score for one in told] == list(result.curve)
    assert told[-1].remaining_s == 0.0
    assert all(one.remaining_s is not None and one.elapsed_s >= 0 and not one.replayed for one in told)


@pytest.mark.parametrize("value", [np.float32(0.5), 1, True])
def test_whatever_is_a_number_is_a_score(value: object) -> None:
    result = run_search(make(), lambda _: value, 2)  # type: ignore[arg-type, return-value]
    assert type(result.best.score) is float


# Failures.


@pytest.mark.parametrize(
    ("breaks", "error"),
    [
        (lambda: math.nan, "score is nan"),
        (lambda: math.inf, "score is inf"),
        (lambda: -math.inf, "score is -inf"),
        (PassError("cannot rewrite"), "PassError: cannot rewrite"),
    ],
)
def test_a_failed_trial_is_recorded_and_the_search_goes_on(
    breaks: Callable[[], float] | Exception, error: str, tmp_path: Path
) -> None:
    calls: list[Policy] = []

    def evaluate(policy: Policy) -> float:
        calls.append(policy)
        if len(calls) % 3:
            return score(policy)
        if isinstance(breaks, Exception):
            raise breaks
        return breaks()

    result = run_search(make(), evaluate, 30, journal=tmp_path / "journal")
    assert len(result.trials) == 30
    assert result.failed >= 9
    assert {trial.error for trial in result.trials if trial.failed} != {None}
    assert all(error in (trial.error or "") for trial in result.trials if trial.failed)
    assert "NaN" not in (tmp_path / "journal").read_text()
    assert read_journal(tmp_path / "journal")[1] == result.trials
    assert run_search(make(), score, 30, journal=tmp_path / "journal") == result


def test_the_engine_is_told_of_every_trial_in_order(tmp_path: Path) -> None:
    """Live and replayed alike: the scores, and FAILED for what failed."""

    def evaluate(policy: Policy) -> float:
        return score(policy) if policy["channels", "conv0"] != 8 else math.nan

    told: list[list[tuple[Policy, float]]] = []
    for _ in range(2):
        engine = make("random")
        observed: list[tuple[Policy, float]] = []
        engine.observe = lambda policy, value, seen=observed: seen.append((policy, value))  # type: ignore[method-assign, misc]
        result = run_search(engine, evaluate, 20, journal=tmp_path / "journal", parallel=3)
        assert observed == [(one.policy, FAILED if one.score is None else one.score) for one in result.trials]
        told.append(observed)
    assert told[0] == told[1]
    assert FAILED in [value for _, value in told[0]]


def test_a_search_without_a_score_is_an_error(tmp_path: Path) -> None:
    def evaluate(_: Policy) -> float:
        raise PassError("cannot rewrite")

    with pytest.raises(SearchError, match=r"None of the 5 trials gave a score.*PassError: cannot rewrite"):
        run_search(make(), evaluate, 5, journal=tmp_path / "journal")
    assert len(read_journal(tmp_path / "journal")[1]) == 5


@pytest.mark.parametrize("threads", [0, 3])
def test_any_other_error_ends_the_search_and_names_the_policy(threads: int, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    engine = make("random")
    with ThreadPoolExecutor(max(threads, 1)) as pool, pytest.raises(SearchError) as failure:
        run_search(
            engine,
            Counted(7, ZeroDivisionError("by zero")),
            20,
            journal=path,
            executor=pool if threads else None,
            parallel=threads or 1,
        )
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    number = len(read_journal(path)[1])
    assert f"Trial {number} broke with ZeroDivisionError: by zero" in str(failure.value)
    assert str(engine.pending[0].to_data()) in str(failure.value)
    assert run_search(make("random"), score, 20, journal=path, parallel=threads or 1) == run_search(
        make("random"), score, 20, parallel=threads or 1
    )


@pytest.mark.parametrize("value", [None, "good", [1.0, 2.0]])
def test_what_is_no_number_is_an_error_that_says_so(value: object) -> None:
    with pytest.raises(SearchError, match=f"Trial 0: .* returned a {type(value).__name__}"):
        run_search(make(), lambda _: value, 2)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", ["trials", "parallel", "patience"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(SearchError, match=f"{name} of at least 1, got 0"):
        run_search(make(), score, **{"trials": 3, name: 0})  # type: ignore[arg-type]


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(SearchError, match="a str; make one"):
        run_search("evolution", score, 3)  # type: ignore[arg-type]


# Executors.


class LastFirst(Executor):
    """Evaluates whatever is waiting in reverse, as soon as one result is asked for."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, function, /, *arguments, **named):  # type: ignore[no-untyped-def]
        executor = self

        class Late(Future):  # type: ignore[type-arg]
            def result(self, timeout: float | None = None) -> object:
                while executor.waiting:
                    executor.waiting.pop()()
                return super().result(timeout)

        future = Late()
        self.waiting.append(lambda: future.set_result(function(*arguments, **named)))
        return future


@pytest.mark.parametrize("name", NAMES)
def test_the_executor_does_not_change_the_result(name: str) -> None:
    expected = run_search(make(name), score, 25, parallel=4)
    assert run_search(make(name), score, 25, parallel=4, executor=LastFirst()) == expected
    with ThreadPoolExecutor(4) as pool:
        assert run_search(make(name), score, 25, parallel=4, executor=pool) == expected


def evaluate_elsewhere(policy: Policy) -> float:
    if policy["channels", "conv0"] == 32:
        raise UnknownNameError("thing", "name", ["names"])
    return float(os.getpid() != 0) * score(policy)


def test_processes_evaluate_and_their_errors_come_home() -> None:
    # Spawned, not forked: the parent may have threads.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = run_search(make("uniform", limit=160.0), evaluate_elsewhere, 6, executor=pool, parallel=2)
    assert "UnknownNameError: Unknown thing 'name'. Did you mean 'names'?" in (result.trials[0].error or "")
    assert result.failed == 1


def test_what_cannot_be_sent_to_processes_is_told_before_any_trial() -> None:
    # No process is started: a pool starts its first when it is given work.
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        pytest.raises(SearchError, match=r"cannot go to other processes.*executor of threads"),
    ):
        run_search(make(), lambda policy: score(policy), 3, executor=pool)


@pytest.mark.parametrize("name", ["trials", "parallel", "patience"])
def test_numbers_are_whole(name: str) -> None:
    with pytest.raises(SearchError, match=rf"{name} of at least 1, got 2\.5; give a whole number"):
        run_search(make(), score, **{"trials": 3, name: 2.5})  # type: ignore[arg-type]


def test_a_journal_of_another_context_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = run_search(make(), score, 4, journal=path, context={"model": "a", "judge": "accuracy"})
    assert run_search(make(), score, 4, journal=path, context={"judge": "accuracy", "model": "a"}) == first
    for context in ({"model": "b", "judge": "accuracy"}, {"judge": "accuracy"}, None):
        with pytest.raises(JournalError, match=r"another search \(.*model: 'a' in the journal") as caught:
            run_search(make(), score, 4, journal=path, context=context)
        assert ("judge" in str(caught.value)) is (context is None)


def test_an_executor_that_refuses_work_is_an_error() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(SearchError, match="executor refuses work"):
        run_search(make(), score, 3, executor=pool)


def test_what_was_not_begun_is_cancelled_when_a_trial_breaks() -> None:
    begun: list[Policy] = []

    def evaluate(policy: Policy) -> float:
        begun.append(policy)
        if len(begun) == 1:
            raise ZeroDivisionError
        time.sleep(0.05)
        return 0.0

    with ThreadPoolExecutor(1) as pool, pytest.raises(SearchError):
        run_search(make("random"), evaluate, 50, executor=pool, parallel=50)
    assert len(begun) < 5


# The journal.


def uninterrupted(name: str, parallel: int, trials: int = 24) -> SearchResult:
    return run_search(make(name), score, trials, parallel=parallel)


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_uninterrupted(name: str, parallel: int, tmp_path: Path) -> None:
    """Interrupted at several places, each time resumed by a fresh engine: the same trials and the same best."""
    path = tmp_path / "runs" / "journal.jsonl"
    expected = uninterrupted(name, parallel)
    for stop in (0, 4, 2):
        evaluate = Counted(stop, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run_search(make(name), evaluate, 24, journal=path, parallel=parallel)
        assert evaluate.calls == stop
    evaluate = Counted()
    result = run_search(make(name), evaluate, 24, journal=path, parallel=parallel)
    assert result == expected
    assert result.resumed == 6 + sum(trial.cached for trial in result.trials[: result.resumed])
    assert evaluate.calls == expected.evaluations - 6
    assert read_journal(path)[1] == expected.trials


def test_a_finished_search_is_replayed_without_evaluating(tmp_path: Path) -> None:
    expected = run_search(make(), score, 12, journal=tmp_path / "journal")
    before = (tmp_path / "journal").read_bytes()
    told: list[SearchProgress] = []
    again = Counted()
    assert run_search(make(), again, 12, journal=tmp_path / "journal", progress=told.append) == expected
    assert again.calls == 0
    assert (tmp_path / "journal").read_bytes() == before
    assert all(one.replayed and one.remaining_s is None for one in told)


@pytest.mark.parametrize(("first", "parallel"), [(10, 1), (10, 4), (3, 4)])
def test_a_search_can_be_extended_and_cut(first: int, parallel: int, tmp_path: Path) -> None:
    """Ten trials and then up to 24 are the same as 24 at once, also when a round was cut in the middle."""
    path = tmp_path / "journal"
    assert run_search(make(), score, first, journal=path, parallel=parallel) == uninterrupted(
        "evolution", parallel, first
    )
    assert run_search(make(), score, 24, journal=path, parallel=parallel) == uninterrupted("evolution", parallel)
    assert run_search(make(), score, first, journal=path, parallel=parallel) == uninterrupted(
        "evolution", parallel, first
    )


def test_resuming_works_across_executors(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_search(make(), Counted(9, KeyboardInterrupt()), 24, journal=tmp_path / "journal", parallel=4)
    with ThreadPoolExecutor(3) as pool:
        result = run_search(make(), score, 24, journal=tmp_path / "journal", parallel=4, executor=pool)
    assert result == uninterrupted("evolution", 4)


@pytest.mark.parametrize("keep", [1, 30, 31])
def test_a_last_line_that_was_cut_short_is_evaluated_again(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    expected = run_search(make(), score, 8, journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    for tail in (lines[-1][:keep], lines[-1][:-1], b"\x00" * keep + b"\n", lines[-1][:keep] + b"\n", b"\x00" * 5000):
        path.write_bytes(b"".join(lines[:-1]) + tail)
        assert len(read_journal(path)[1]) == 7
        evaluate = Counted()
        assert run_search(make(), evaluate, 8, journal=path) == expected
        assert evaluate.calls == 1
        assert [json.loads(line)["trial"] for line in path.read_text().splitlines()[1:]] == list(range(8))


def test_a_first_line_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    expected = run_search(make(), score, 3, journal=path)
    header = path.read_bytes().split(b"\n")[0]
    for content in (b"", header[:1], header[:40], header):
        path.write_bytes(content)
        assert run_search(make(), score, 3, journal=path) == expected


def test_trials_are_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    lengths: list[int] = []

    def evaluate(policy: Policy) -> float:
        lengths.append(len(path.read_bytes().splitlines()) - 1)
        return score(policy)

    run_search(make("random"), evaluate, 5, journal=path)
    assert lengths == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: (make(seed=1), 1), "seed: 0 in the journal, 1 now"),
        (lambda: (make(limit=90.0), 1), "constraint: {'size': 100.0} in the journal, {'size': 90.0} now"),
        (lambda: (make("random"), 1), "engine: 'evolution' in the journal, 'random' now"),
        (lambda: (make(), 2), "parallel: 1 in the journal, 2 now"),
        (lambda: (engines.create("evolution", SPACE), 1), "constraint: .* None now"),
        (lambda: (engines.create("evolution", SPACE[:3]), 1), "space: "),
        (lambda: (engines.create("evolution", SPACE, population=9), 1), "options: .*'population': 9"),
    ],
)
def test_the_journal_of_another_search_is_refused_and_left_alone(
    other: Callable[[], tuple[Engine, int]], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    run_search(make(), score, 3, journal=path)
    path.write_bytes(path.read_bytes() + b'{"cut')
    before = path.read_bytes()
    engine, parallel = other()
    with pytest.raises(JournalError, match=named) as failure:
        run_search(engine, score, 3, journal=path, parallel=parallel)
    assert "resume" in str(failure.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"hello", b"hello\n", b"a = 1\nb = 2\n", b'{"schema": 1}\n', b"[]\n[]\n", b'{"schema": 1, "decisions": []}'],
)
def test_a_file_that_is_no_journal_is_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"notes\.txt"):
        run_search(make(), score, 3, journal=path)
    with pytest.raises(JournalError, match=r"notes\.txt"):
        read_journal(path)
    assert path.read_bytes() == content


def edited(path: Path, number: int, **fields: object) -> None:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **fields})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("number", "fields", "reason"),
    [
        (2, {"trial": 7}, "line 3 is not trial 1"),
        (2, {"policy": {"schema": 9, "decisions": []}}, "line 3: .*schema version 9"),
        (2, {"score": "high"}, "line 3 has the status 'ok' and the score 'high'"),
        (2, {"score": None}, "line 3 has the status 'ok'"),
        (2, {"status": "failed"}, "line 3 has the status 'failed'"),
        (2, {"policy": Policy().to_data()}, "trial 1: the search proposes another policy"),
        (0, {"schema": 2}, "journal schema 2"),
    ],
)
def test_a_damaged_journal_is_refused(number: int, fields: dict[str, object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    run_search(make(), score, 4, journal=path)
    edited(path, number, **fields)
    with pytest.raises(JournalError, match=reason):
        run_search(make(), score, 4, journal=path)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    run_search(make(), score, 4, journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:20] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match="line 3 is not trial 1"):
        run_search(make(), score, 4, journal=path)


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "journal", tmp_path):
        with pytest.raises(JournalError, match="Cannot write the journal"):
            run_search(make(), score, 3, journal=path)
    with pytest.raises(JournalError, match="Cannot read the journal"):
        read_journal(tmp_path / "missing")


def test_a_full_disk_is_an_error_and_what_was_written_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    synced: list[int] = []

    def sync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(JournalError, match=r"No space left on device.*The 2 trials before are safe"):
        run_search(make(), score, 9, journal=path)
    assert len(synced) == 4, "the header and every trial are flushed to the disk"
    monkeypatch.undo()
    assert run_search(make(), score, 9, journal=path) == run_search(make(), score, 9)


def test_one_search_writes_a_journal_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "journal"

    def evaluate(policy: Policy) -> float:
        with pytest.raises(JournalError, match="in use"):
            run_search(make(), score, 3, journal=path)
        return score(policy)

    run_search(make(), evaluate, 2, journal=path)


def test_a_used_engine_cannot_resume(tmp_path: Path) -> None:
    engine = make()
    run_search(engine, score, 3)
    assert len(run_search(engine, score, 3).trials) == 3
    with pytest.raises(SearchError, match="fresh engine"):
        run_search(engine, score, 3, journal=tmp_path / "journal")


def test_options_that_are_no_json_are_refused(tmp_path: Path) -> None:
    class Odd(type(make("random"))):  # type: ignore[misc]
        @property
        def options(self) -> dict[str, object]:
            return {"callback": print}

    with pytest.raises(JournalError, match="JSON-ready"):
        run_search(Odd(SPACE), score, 3, journal=tmp_path / "journal")


def test_the_journal_is_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    result = run_search(make(seed=3), score, 2, journal=path)
    header, trials = read_journal(path)
    assert header["journal"] == "fxopt.search"
    assert header["schema"] == 1
    assert header["space"] == SPACE.fingerprint
    assert header["constraint"] == {"size": 100.0}
    assert (header["engine"], header["seed"], header["parallel"]) == ("evolution", 3, 1)
    assert set(header["versions"]) == {"fxopt", "numpy", "python"}
    assert trials == result.trials
    assert isinstance(trials[0], Trial)
    first = json.loads(path.read_text().splitlines()[1])
    assert set(first) == {"trial", "status", "score", "error", "cached", "elapsed_s", "policy"}
    assert first["policy"] == trials[0].policy.to_data()
