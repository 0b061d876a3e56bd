"""The passes by name: create one, or register your own.

Passes are loaded when they are asked for, so that a name costs nothing to know and ``import fxopt.passes`` loads no
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxopt._named import Registry, lazily
from fxopt.errors import PassError

if TYPE_CHECKING:
    from fxopt.passes._importance import BatchNormScale as BatchNormScale
    from fxopt.passes._importance import Fisher as Fisher
    from fxopt.passes._importance import GeometricMedian as GeometricMedian
    from fxopt.passes._importance import Importance as Importance
    from fxopt.passes._importance import Magnitude as Magnitude
    from fxopt.passes._importance import Random as Random
    from fxopt.passes._importance import Taylor as Taylor
    from fxopt.passes.base import Pass as Pass
    from fxopt.passes.base import PassResult as PassResult
    from fxopt.passes.base import Pipeline as Pipeline
    from fxopt.passes.base import Refusal as Refusal
    from fxopt.passes.base import TunablePass as TunablePass
    from fxopt.passes.canonicalize import Canonicalize as Canonicalize
    from fxopt.passes.equalize_weights import EqualizeWeights as EqualizeWeights
    from fxopt.passes.fold_batch_norm import FoldBatchNorm as FoldBatchNorm
    from fxopt.passes.prune_channels import PruneChannels as PruneChannels
    from fxopt.passes.quantize import Quantize as Quantize
    from fxopt.passes.reconstruct_blocks import ReconstructBlocks as ReconstructBlocks
    from fxopt.passes.round_weights import RoundWeights as RoundWeights
    from fxopt.passes.select_operators import SelectOperators as SelectOperators
    from fxopt.passes.sparsify_weights import SparsifyWeights as SparsifyWeights

_PASSES: Registry[Pass] = Registry(
    "pass",
    "fxopt.passes:Pass",
    PassError,
    {
        "canonicalize": "fxopt.passes.canonicalize:Canonicalize",
        "equalize-weights": "fxopt.passes.equalize_weights:EqualizeWeights",
        "fold-batch-norm": "fxopt.passes.fold_batch_norm:FoldBatchNorm",
        "prune-channels": "fxopt.passes.prune_channels:PruneChannels",
        "quantize": "fxopt.passes.quantize:Quantize",
        "sparsify-weights": "fxopt.passes.sparsify_weights:SparsifyWeights",
        "reconstruct-blocks": "fxopt.passes.reconstruct_blocks:ReconstructBlocks",
        "round-weights": "fxopt.passes.round_weights:RoundWeights",
        "select-operators": "fxopt.passes.select_operators:SelectOperators",
    },
)

_LAZY = {
    "BatchNormScale": "fxopt.passes._importance",
    "Fisher": "fxopt.passes._importance",
    "GeometricMedian": "fxopt.passes._importance",
    "Importance": "fxopt.passes._importance",
    "Magnitude": "fxopt.passes._importance",
    "Random": "fxopt.passes._importance",
    "Taylor": "fxopt.passes._importance",
    "Canonicalize": "fxopt.passes.canonicalize",
    "EqualizeWeights": "fxopt.passes.equalize_weights",
    "FoldBatchNorm": "fxopt.passes.fold_batch_norm",
    "Pass": "fxopt.passes.base",
    "PassResult": "fxopt.passes.base",
    "Pipeline": "fxopt.passes.base",
    "PruneChannels": "fxopt.passes.prune_channels",
    "Quantize": "fxopt.passes.quantize",
    "Refusal": "fxopt.passes.base",
    "SparsifyWeights": "fxopt.passes.sparsify_weights",
    "ReconstructBlocks": "fxopt.passes.reconstruct_blocks",
    "RoundWeights": "fxopt.passes.round_weights",
    "SelectOperators": "fxopt.passes.select_operators",
    "TunablePass": "fxopt.passes.base",
}

__all__ = [
    "BatchNormScale",
    "Canonicalize",
    "EqualizeWeights",
    "Fisher",
    "FoldBatchNorm",
    "GeometricMedian",
    "Importance",
    "Magnitude",
    "Pass",
    "PassResult",
    "Pipeline",
    "PruneChannels",
    "Quantize",
    "Random",
    "ReconstructBlocks",
    "Refusal",
    "RoundWeights",
    "SelectOperators",
    "SparsifyWeights",
    "Taylor",
    "TunablePass",
    "create",
    "load",
    "names",
    "register",
]


__getattr__, __dir__ = lazily(__name__, _LAZY, __all__)


def names() -> list[str]:
    """The names of all passes, sorted."""
    return _PASSES.names()


def load(name: str) -> type[Pass]:
    """The pass class under ``name``.

    Raises:
        UnknownNameError: If there is none; suggests the nearest name.
        PassError: If a registered path leads to no pass.
    """
    return _PASSES.load(name)


def create(name: str, **options: Any) -> Pass:
    """A pass by its name.

    Args:
        name: The pass's name; see :func:`names`.
        **options: The pass's fields.

    Raises:
        UnknownNameError: If there is no such pass; suggests the nearest name.
        PassError: If an option is unknown or its value does not fit.
    """
    return _PASSES.load_for(name, options)(**options)


def register(name: str, kind: type[Pass] | str) -> None:
    """Make a pass known by name.

    Args:
        name: The name; it must be free.
        kind: The class, or its path ``"package.module:Class"``, which is imported on first use.

    Raises:
        PassError: If the name is taken or the path has another form.
    """
    _PASSES.register(name, kind)
