"""A training that is killed at any moment, the writing of a checkpoint included, goes on as if it had not been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fxopt import _files
from fxopt.nas import CostTerm, Supernet, SupernetSettings, train_supernet
from tests.nas.toys import between, loader, mobile, mobile_table

METHODS = ("binary", "binary-all", "relaxed", "reinforce", "uniform")
BATCHES = 3
"""Batches of a pass."""


class _Augmented:
    """Batches whose order and noise come from torch's global generator, as those of a DataLoader do."""

    def __init__(self, seed: int, kill: dict[str, int]) -> None:
        self._batches = [*loader(8 * BATCHES, seed=seed)]
        self._kill = kill

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        for place in torch.randperm(BATCHES).tolist():
            _count_down(self._kill, "batches")
            x, y = self._batches[place]
            yield x + 0.1 * torch.randn_like(x), y


def _count_down(kill: dict[str, int], what: str) -> None:
    if what in kill:
        kill[what] -= 1
        if kill[what] < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def train(supernet: Supernet, method: Any, place: Path, kill: dict[str, int]) -> None:
    """Train, and die by SIGKILL at a batch, or with a checkpoint half written, if ``kill`` says so."""
    real = _files._sync

    def killed(path: Path) -> None:
        if kill.get("writes") == 0:
            path.write_bytes(path.read_bytes()[:1000])
        _count_down(kill, "writes")
        real(path)

    _files._sync = killed
    settings = SupernetSettings(method=method, warm_up=1, epochs=2, learning_rate=0.02)
    terms = [CostTerm("latency", between(0.7), "budget", 0.5), CostTerm("size", 2e3, "multiplicative")]
    data = _Augmented(0, kill), _Augmented(1, kill)
    train_supernet(supernet, *data, mobile_table(), terms, settings=settings, checkpoint=place, checkpoint_steps=2)


def killed_and_resumed(folder: Path) -> None:
    """Every method: whole, and killed three times on the way; every training is a fork that begins with one net."""
    torch.set_num_threads(1)
    chance, supernet = random.Random(0), Supernet(*mobile())
    between(0.5)
    for method in METHODS:
        deaths = [
            {"batches": chance.randint(1, 5)},
            {"writes": chance.randint(0, 1)},
            {"batches": chance.randint(0, 3)},
        ]
        places = [folder / f"{method}-whole", *[folder / f"{method}-killed"] * 4]
        for place, kill in zip(places, ({}, *deaths, {}), strict=True):
            child = os.fork()
            if not child:
                train(supernet, method, place, kill)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert ended == (-signal.SIGKILL if kill else 0), (method, kill)
        whole, resumed = (place.with_suffix(".safetensors").read_bytes() for place in (places[0], places[-1]))
        assert whole == resumed, method


def test_killed_training_resumes_to_the_last_byte(tmp_path: Path) -> None:
    """In an interpreter of its own, whose forks have no threads of other tests."""
    root = Path(__file__).parents[2]
    code = "import pathlib, sys; from tests.nas.test_killed import *; killed_and_resumed(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        cwd=root,
        timeout=280,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
