"""Trials run on the workers of a Dask cluster as they do here."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from fxopt.decisions import Decision, Policy, SearchSpace
from fxopt.search import engines, run_search

distributed = pytest.importorskip("distributed")


def space() -> SearchSpace:
    return SearchSpace(
        [Decision("channels", f"block{place}", choices=(8, 16, 24, 32), default=32) for place in range(6)]
    )


class Score:
    """The more alike the widths the better; notes which process judged."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, policy: Policy) -> float:
        Path(self.folder, str(os.getpid())).touch()
        widths = [int(width) for width in policy.values()]
        return -float(sum(abs(a - b) for a, b in itertools.pairwise(widths)) + max(widths))


def test_a_cluster_of_two_processes_finds_what_one_finds(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    alone = run_search(engines.create("evolution", space(), seed=0), Score(here), 40, parallel=4)
    journal = tmp_path / "journal.jsonl"
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        for trials in (20, 40):
            engine = engines.create("evolution", space(), seed=0)
            spread = run_search(
                engine, Score(there), trials, executor=client.get_executor(), parallel=4, journal=journal
            )
    assert spread.policy == alone.policy
    assert spread.score == alone.score
    assert spread.resumed == 20
    assert [int(one.name) for one in here.iterdir()] == [os.getpid()]
    workers = {int(one.name) for one in there.iterdir()}
    assert len(workers) == 2
    assert os.getpid() not in workers
