"""``fxopt explain``: which channels of a model can be cut, and what keeps the others from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fxopt._cli.output import table

if TYPE_CHECKING:
    from rich.table import Table

    from fxopt.passes import PruneChannels

__all__ = ["explain"]


def explain(
    reference: str, keep: float, step: PruneChannels, inputs: Sequence[str]
) -> tuple[dict[str, Any], list[Table | str]]:
    """What a pass would cut of the model that ``reference`` names, as plain data and as tables for rich.

    Raises:
        FxoptError: If the model cannot be loaded or traced, or the fraction is out of range.
    """
    from fxopt._cli.loading import load_model
    from fxopt.graph import trace
    from fxopt.passes import Canonicalize
    from fxopt.passes.prune_channels import COLUMNS

    model, example = load_model(reference, inputs)
    graph = Canonicalize()(trace(model.eval(), example)).graph_module
    policy = step.search_space(graph).uniform(keep)
    found = step.with_policy(policy).explain(graph)
    parameters = sum(parameter.numel() for parameter in graph.parameters())
    pruned = step.with_policy(policy)(graph).graph_module
    left = sum(parameter.numel() for parameter in pruned.parameters())
    data = {"model": reference, **found.to_data(), "parameters": parameters, "parameters_left": left}
    tables: list[Table | str] = [table(f"Channel groups of {reference}", COLUMNS, found.rows(), left=2)]
    if found.frozen:
        rows = [(reason, f"{share:.1%}") for reason, share in found.frozen.items()]
        tables.append(table("What keeps channels from being cut", ("reason", "share of the parameters"), rows))
    tables.append(f"Parameters: {parameters:,} -> {left:,}" if left < parameters else f"Parameters: {parameters:,}")
    return data, tables
