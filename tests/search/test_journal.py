"""The journal of a search: what is on disk, resuming, damage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fxopt.decisions import Policy
from fxopt.errors import JournalError, SearchError
from fxopt.search import Engine, SearchProgress, SearchResult, Trial, engines, read_journal, run_search
from tests.search.searching import NAMES, SPACE, Counted, make, score


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


def test_a_journal_of_another_context_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = run_search(make(), score, 4, journal=path, context={"model": "a", "judge": "accuracy"})
    assert run_search(make(), score, 4, journal=path, context={"judge": "accuracy", "model": "a"}) == first
    for context in ({"model": "b", "judge": "accuracy"}, {"judge": "accuracy"}, None):
        with pytest.raises(JournalError, match=r"another search \(.*model: 'a' in the journal") as caught:
            run_search(make(), score, 4, journal=path, context=context)
        assert ("judge" in str(caught.value)) is (context is None)
