"""A supernet's training on disk: one file of tensors, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import FxoptError
from fxopt.nas._architecture import Reinforce
from fxopt.nas._run import Run
from fxopt.nas._settings import Epoch
from fxopt.training import read_tensors, write_tensors

__all__ = ["restore", "store"]

_NET, _ALPHA = "net.", "alpha"
_SPELT = {
    "warm up": "warm-up (in optimize, its epochs)",
    "epochs": "epochs of the search (in optimize, of its epochs)",
}
_OPTIMIZERS = {"weights.": "optimizer", "architecture.": "alpha_optimizer"}


def store(run: Run, stem: Path, step: int) -> None:
    """Write everything that decides what the training does next, whole or not at all; the first process does."""
    if not run.workers.is_first:
        return
    tensors = {f"{_NET}{name}": tensor for name, tensor in run.supernet.net.state_dict().items()}
    tensors[_ALPHA] = run.supernet.alpha
    for prefix, attribute in _OPTIMIZERS.items():
        for index, state in getattr(run, attribute).state_dict()["state"].items():
            tensors |= {f"{prefix}{index}.{key}": one for key, one in state.items() if isinstance(one, torch.Tensor)}
    baseline = run.method.baseline if isinstance(run.method, Reinforce) else None
    told = {
        "step": step,
        "history": [asdict(epoch) for epoch in run.history],
        "sums": run.sums,
        "duals": run.cost.duals,
        "baseline": baseline,
        "identity": _identity(run),
    }
    write_tensors(stem, tensors, {"supernet": json.dumps(told)})


def restore(run: Run, stem: Path | None) -> int:
    """Put a training at the state that was written, if there is one; the number of steps that were done.

    Raises:
        FxoptError: If the file is damaged or of another training.
    """
    found = None if stem is None else read_tensors(stem)
    if found is None:
        return 0
    path, tensors, metadata = found
    try:
        told: dict[str, Any] = json.loads(metadata["supernet"])
        for name, value in _identity(run).items():
            if told["identity"].get(name) != value:
                what = _SPELT.get(name, name)
                raise FxoptError(
                    f"{path} is a checkpoint of another training; its {what}: {told['identity'].get(name)}, of this "
                    f"one: {value}. Give the same options to resume, or remove the file to start afresh."
                )
        net = {name.removeprefix(_NET): one for name, one in tensors.items() if name.startswith(_NET)}
        _check_shapes({**run.supernet.net.state_dict(), _ALPHA: run.supernet.alpha}, {**net, _ALPHA: tensors[_ALPHA]})
        run.supernet.net.load_state_dict(net)
        with torch.no_grad():
            run.supernet.alpha.copy_(tensors[_ALPHA])
        for prefix, attribute in _OPTIMIZERS.items():
            _load_optimizer(getattr(run, attribute), prefix, tensors)
        run.history = [Epoch(**one) for one in told["history"]]
        run.sums, run.cost.duals = list(told["sums"]), list(told["duals"])
        if isinstance(run.method, Reinforce):
            run.method.baseline = told["baseline"]
        return int(told["step"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as failure:
        reason = (str(failure).splitlines() or [""])[0].rstrip(".")
        raise FxoptError(f"{path} is no checkpoint of this supernet: {reason}. Remove it to start afresh.") from failure


def _check_shapes(mine: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """All tensors fit, before the first of them is put in its place."""
    for name, tensor in mine.items():
        if name not in saved or saved[name].shape != tensor.shape:
            found = tuple(saved[name].shape) if name in saved else "nothing"
            raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, and the file has {found}.")


def _load_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    state = optimizer.state_dict()
    state["state"] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, _, key = name.removeprefix(prefix).partition(".")
            state["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(state)


def _identity(run: Run) -> dict[str, Any]:
    """What has to be the same for training to be resumed, as JSON gives it back."""
    found = {
        **{name.replace("_", " "): value for name, value in asdict(run.settings).items()},
        "model and its weights, candidates and their seed included": run.origin,
        "loss": run.loss_name,
        "decisions": run.supernet.space.fingerprint,
        "batches for weights": run.train.steps,
        "batches for the architecture": run.val.steps,
        "terms of the cost, which target, budget and shares decide": [asdict(term) for term in run.cost.terms],
        "costs of candidates on the target": run.cost.digest,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain
