"""A training on disk: everything that it takes to go on as if it had not been stopped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fxopt._digests import digest_of_tensors
from fxopt._files import path_of, replacing
from fxopt.errors import FxoptError
from fxopt.training._options import History

__all__ = ["Checkpoint", "file_of", "read_tensors", "stem_of", "write_tensors"]

_TOLD = ("loss", "learning_rate", "gradient_norm", "score", "best_epoch", "first_loss")
_MODEL, _OPTIMIZER, _BEST = "model.", "optimizer.", "best."
_METADATA, _DIGEST = "told", "digest"


@dataclass(frozen=True)
class Checkpoint:
    """Where a training is kept.

    Attributes:
        stem: The file, without suffix.
        settings: What has to be the same for the training to be resumed, JSON-ready.
    """

    stem: Path
    settings: Mapping[str, Any]

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        history: History,
        best: Mapping[str, torch.Tensor],
    ) -> None:
        """Write model, optimizer, history and the best weights so far.

        Raises:
            FxoptError: If it cannot be written; what stood there is untouched.
        """
        tensors = {f"{_MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {f"{_BEST}{name}": tensor for name, tensor in best.items()}
        for index, state in optimizer.state_dict()["state"].items():
            found = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            tensors |= {f"{_OPTIMIZER}{index}.{key}": value for key, value in found.items()}
        told = {name: getattr(history, name) for name in _TOLD}
        metadata = {"history": json.dumps(told), "settings": json.dumps(self.settings)}
        write_tensors(self.stem, tensors, metadata)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[History, dict[str, torch.Tensor]]:
        """Put model and optimizer where they were saved, if they were.

        Returns:
            History and best weights, both empty if nothing was saved.

        Raises:
            FxoptError: If the file is no checkpoint of this training; model and optimizer are as they were.
        """
        found = read_tensors(self.stem)
        if found is None:
            return History(), {}
        path, tensors, metadata = found
        with _reading(path):
            told, settings = json.loads(metadata["history"]), json.loads(metadata["settings"])
        self._check_settings(path, settings)
        with _reading(path):
            history = History(**{name: told[name] for name in _TOLD}, resumed_at=len(told["loss"]))
            parts = {prefix: _with_prefix(tensors, prefix) for prefix in (_MODEL, _OPTIMIZER, _BEST)}
            model.load_state_dict(parts[_MODEL])
            state = optimizer.state_dict()
            state["state"] = {}
            for name, tensor in parts[_OPTIMIZER].items():
                index, _, key = name.partition(".")
                state["state"].setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict(state)
        return history, parts[_BEST]

    def _check_settings(self, path: Path, saved: Mapping[str, Any]) -> None:
        mine = json.loads(json.dumps(self.settings))
        for name, value in mine.items():
            if saved.get(name) != value:
                raise FxoptError(
                    f"{path} is a checkpoint of a training with {name} = {saved.get(name)}, this one has {value}. "
                    "Give the same options to resume, or remove the file to start afresh."
                )


def stem_of(checkpoint: object) -> Path:
    """The file that is meant by ``checkpoint``, without suffix.

    Raises:
        FxoptError: If it is no path, or that of a folder.
    """
    stem = path_of("checkpoint", checkpoint)
    if stem.is_dir():
        raise FxoptError(f"checkpoint is the folder {stem}; give a file in it, such as {stem / 'training'}.")
    if file_of(stem).is_dir():
        raise FxoptError(f"{file_of(stem)} is a folder; give another path for checkpoint, or remove the folder.")
    return stem


def write_tensors(stem: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``<stem>.safetensors`` whole or not at all.

    Raises:
        FxoptError: If it cannot be written; what stood there is untouched.
    """
    path = file_of(stem)
    own = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    told = dict(metadata or {})
    with replacing(path) as scratch:
        try:
            # One entry: several are written in any order, and the same training is to give the same file.
            save_file(own, scratch, metadata={_METADATA: json.dumps(told | {_DIGEST: _digest(own, told)})})
        except SafetensorError as failure:
            raise FxoptError(f"Cannot write {path}: {failure}. Choose a folder that has space.") from failure


def read_tensors(stem: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]] | None:
    """Path, tensors and metadata of ``<stem>.safetensors``; None if there is no such file.

    Raises:
        FxoptError: If it cannot be read.
    """
    path = file_of(stem)
    if not path.exists():
        return None
    with _reading(path):
        with safe_open(path, framework="pt") as file:
            written = file.metadata() or {}
        if _METADATA not in written:
            raise ValueError("it has no digest, as those of fxopt 0.1.0 and before")
        metadata = json.loads(written[_METADATA])
        wanted = metadata.pop(_DIGEST)
        tensors = load_file(path)
    if _digest(tensors, metadata) != wanted:
        raise FxoptError(f"{path} is damaged: its content has changed since it was written. Remove it to start afresh.")
    return path, tensors, metadata


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """A name for all that a file holds; files tell tensors and metadata in an order of their own."""
    return digest_of_tensors(dict(sorted(tensors.items())), json.dumps(metadata, sort_keys=True))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as failure:
        reason = (str(failure).splitlines() or [""])[0].rstrip(".")
        raise FxoptError(f"{path} is no checkpoint of this model: {reason}. Remove it to start afresh.") from failure


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def file_of(stem: Path) -> Path:
    """The file of a checkpoint."""
    return stem.with_name(f"{stem.name}.safetensors")
