"""From a policy to a score: what the search is told."""

from __future__ import annotations

import contextlib
import math
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt._applying import SETTLING_BATCHES, InputsOnly, Stages, apply_policy, recalibrate_batch_norm
from fxopt._seeding import seeded
from fxopt.data import (
    IGNORED_LABEL,
    Loader,
    batch_for,
    blaming,
    call_model,
    class_numbers,
    class_scores,
    read,
)
from fxopt.decisions import Policy
from fxopt.errors import DataError, SearchError
from fxopt.graph import eval_mode, trace
from fxopt.graph.edit import own_copy
from fxopt.passes import Canonicalize, FoldBatchNorm, PruneChannels, Quantize, RoundWeights, TunablePass
from fxopt.passes._calibrate import feed, synthetic_batch
from fxopt.passes._findings import Findings
from fxopt.passes._reconstruction import Reconstruction, Reconstructor

__all__ = [
    "Evaluator",
    "Reconstruction",
    "Reconstructor",
    "Training",
    "accuracy",
    "apply_policy",
    "recalibrate_batch_norm",
]

Judge: TypeAlias = Callable[[nn.Module], float]


class Training(Protocol):
    """Trains a graph in place."""

    def __call__(self, graph: fx.GraphModule, teacher: fx.GraphModule, *, on_grids: bool) -> object:
        """Train ``graph``, which was made of ``teacher``; ``on_grids`` if it is quantized."""


_SETTLING_BYTES = 2**28
_OTHER_TASKS = "give evaluate=callable(module) -> float"


def accuracy(model: nn.Module, loader: Loader, max_batches: int | None = None) -> float:
    """Part of the samples whose largest class score (over dimension 1) is at the label.

    Args:
        model: A classifier; evaluated in eval mode.
        loader: Batches of (input, label), labels of the shape of the scores without dimension 1.
        max_batches: Batches to look at, or None for all.

    Raises:
        DataError: If the loader yields nothing or fails, the model's output is no tensor of class scores, or the labels
            do not fit it. Labels of :data:`fxopt.data.IGNORED_LABEL` count for nothing.
    """
    right = seen = 0
    with torch.no_grad(), eval_mode(model):
        for batch in read(loader, "val", max_batches):
            inputs, label = batch_for(model, batch, "val")
            scores = class_scores(call_model(model, inputs, "val"), _OTHER_TASKS)
            numbers = class_numbers(label, scores, "val", f"for another task {_OTHER_TASKS}")
            right += int((scores.argmax(1) == numbers).sum())
            seen += int((numbers != IGNORED_LABEL).sum())
    if not seen:
        raise DataError("val yields nothing to judge by; give a loader with at least one labelled sample.")
    return right / seen


class Evaluator:
    """Scores policies, each once.

    The graph is rewritten with shared weights, the weights behind cut channels are found anew and batch norm is
    estimated anew from a few training batches, and the result is judged by the user's function, by accuracy on part of
    the validation data, or, without data, by how far its outputs on random inputs are from those of the original: minus
    the relative error.

    The batches that trials use are read once, at the start, and kept: every policy is judged on the same data. Trials
    may run on threads, which rewrite the graph one at a time. They may run in other processes if ``source`` is given
    and everything else can be pickled; each process then traces the model once.

    Args:
        gm: The original graph. It is not changed.
        passes: The passes in order.
        train: Batches to calibrate on, or None.
        val: Batches to judge by, or None.
        evaluate: A function of a module that judges it in place of ``val``.
        max_batches: Validation batches a trial looks at.
        reward: What a trial is worth, from the score and the policy; the score itself by default. See
            :mod:`fxopt.objectives`.
        seed: Seed of the random inputs, and of torch's generator while the batches are read.
        source: The model that ``gm`` was traced from and its example inputs, for trials in other processes.
        made_by: The passes that made ``gm`` of that model's graph, in order; other processes do the same, and are given
            the weights.
        reconstruct: Whether weights behind cut channels are found anew by least squares, or how; see
            :func:`apply_policy`.
        training: Trains the network of a trial in place; None for no training. Trials on threads then train one at a
            time.

    Attributes:
        score_name: What the score is, for reports.

    Raises:
        DataError: If there are neither data nor floating-point outputs to judge by.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        passes: Sequence[TunablePass],
        *,
        train: Loader | None = None,
        val: Loader | None = None,
        evaluate: Judge | None = None,
        max_batches: int = 8,
        reward: Callable[[float, Policy], float] | None = None,
        seed: int = 0,
        source: tuple[nn.Module, Any] | None = None,
        made_by: Sequence[TunablePass] = (),
        reconstruct: bool | Reconstruction = True,
        training: Training | None = None,
    ) -> None:
        _check_way(reconstruct)
        self._gm: fx.GraphModule | None = gm
        self._source = source
        self._made_by = tuple(made_by)
        self._weights: dict[str, torch.Tensor] | None = None
        self._passes = tuple(passes)
        self._evaluate = evaluate
        self._reward = reward
        self._scores: dict[Policy, float] = {}
        self._identity = uuid.uuid4().hex
        self._rewriting = threading.Lock()
        self._reconstruct = reconstruct
        self._training = training
        self._seed = seed
        self._reconstructor: Reconstructor | None = None
        self._shared: tuple[fx.GraphModule, tuple[TunablePass, ...]] | None = None
        with seeded(seed):
            self._train = None if train is None else _settling_batches(train, reconstruct)
            self._part = None if val is None or evaluate is not None else list(read(val, "val", max_batches))
        self._val = val
        self._probe = _probe_inputs(gm, seed) if val is None and evaluate is None else None
        self._wanted = self._outputs(gm)
        if self._probe is not None and not self._wanted:
            raise DataError(
                "The model has no floating-point output to compare without data; give val, or "
                "evaluate=callable(module) -> float."
            )
        self.score_name = (
            "evaluate" if evaluate is not None else "accuracy" if val is not None else "data-free: minus output error"
        )

    def __call__(self, policy: Policy) -> float:
        """What a policy is worth; higher is better.

        Raises:
            FxoptError: If the policy cannot be applied or the data do not fit the model.
        """
        score = self.score(policy)
        return score if self._reward is None else self._reward(score, policy)

    def score(self, policy: Policy) -> float:
        """The score of a policy, whatever the reward makes of it.

        Raises:
            FxoptError: If the policy cannot be applied or the data do not fit the model.
        """
        if policy not in self._scores:
            self._scores[policy] = self._judge(self._rewritten(policy), self._part)
        return self._scores[policy]

    def judge(self, model: nn.Module) -> float:
        """The score of a model on all of the validation data, without any preference for cheap ones.

        Raises:
            DataError: If ``evaluate`` fails or gives no number, or the data do not fit the model.
        """
        with contextlib.nullcontext() if self._evaluate is None else blaming("evaluate", "Correct it and run again."):
            return self._judge(model, self._val)

    def sample(self, most: int) -> Any:
        """Inputs of at most so many samples that trials are calibrated on or judged by; random ones if there are none.

        Args:
            most: Samples.

        Returns:
            Inputs as :func:`fxopt.graph.trace` takes them.
        """
        known = self._train or self._part
        inputs: Any = next(iter(InputsOnly(known))) if known else _probe_inputs(self._graph(), self._seed)
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        count = len(tensors[0]) if tensors else 0
        return pytree.tree_map_only(torch.Tensor, lambda one: one[:most] if one.shape[:1] == (count,) else one, inputs)

    def rehearse(self) -> float:
        """The score of the original graph, after a look at everything that trials will use.

        Whatever is wrong with the data or the user's function then shows in the original, before any policy is tried.

        Raises:
            DataError: If the batches do not fit the model or its graph, or the score is no finite number.
        """
        graph = self._graph()
        with torch.no_grad(), eval_mode(graph):
            for batch in self._train or ():
                call_model(graph, batch_for(graph, batch, "train")[0], "train")
        if self._train is not None and any(isinstance(one, Quantize) for one in self._passes):
            for number, inputs in enumerate(InputsOnly(self._train)):
                feed(graph, inputs, f"train, batch {number}")
        score = self.judge(graph)
        if not math.isfinite(score):
            raise DataError(f"The original model has the score {score} by {self.score_name}; it has to be finite.")
        return score

    def _judge(self, model: nn.Module, data: Loader | None) -> float:
        if self._evaluate is not None:
            with torch.no_grad(), eval_mode(model):
                score: Any = self._evaluate(model)
            try:
                return float(score)
            except (TypeError, ValueError, RuntimeError) as failure:
                raise DataError(f"evaluate gives a {type(score).__name__}; it has to give a number.") from failure
        if data is not None:
            return accuracy(model, data)
        return 0.0 - self._output_error(model)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the graph, which cannot be pickled, and the data that trials do not use.

        Raises:
            SearchError: If there is no source to trace the graph from again.
        """
        if self._source is None:
            raise SearchError("This evaluation cannot leave its process; give an executor of threads.")
        kept = {name: value for name, value in self.__dict__.items() if name != "_rewriting"}
        if self._made_by and self._weights is None:
            kept["_weights"] = {name: one.detach() for name, one in self._graph().state_dict().items()}
        return {**kept, "_gm": None, "_val": self._part, "_scores": {}, "_reconstructor": None, "_shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come alive in another process; the graph is traced when it is needed."""
        self.__dict__.update(state)
        self._rewriting = threading.Lock()

    def _graph(self) -> fx.GraphModule:
        if self._gm is None:
            self._gm = _GRAPHS.get(self._identity) or self._traced()
            _GRAPHS.clear()
            _GRAPHS[self._identity] = self._gm
        return self._gm

    def _traced(self) -> fx.GraphModule:
        if self._source is None:
            raise SearchError("This evaluation has neither graph nor model; make it anew.")
        model, inputs = self._source
        graph: fx.GraphModule = Canonicalize()(trace(model.eval(), inputs)).graph_module
        if not self._made_by:
            return graph
        for one in self._made_by:
            graph = one(graph).graph_module
        graph.load_state_dict(self._weights or {})
        return graph.eval()

    def _rewritten(self, policy: Policy) -> fx.GraphModule:
        # The fake tensors that shapes are propagated with belong to one mode, which threads must not share.
        with self._rewriting:
            graph, passes = self._prepared()
            how = self._reconstructor or self._reconstruct
            if self._reconstructor is None and how is not False and self._train is not None and self._cuts(policy):
                options = how if isinstance(how, Reconstruction) else None
                how = self._reconstructor = Reconstructor(graph, InputsOnly(self._train), options)
            if self._training is None:
                return apply_policy(graph, passes, policy, calibration=self._train, reconstruct=how)
            return self._trained(graph, passes, policy, how, self._training)

    def _trained(
        self,
        graph: fx.GraphModule,
        passes: tuple[TunablePass, ...],
        policy: Policy,
        how: bool | Reconstruction | Reconstructor,
        training: Training,
    ) -> fx.GraphModule:
        """What a policy makes, trained; no tensor of the graph changes."""
        stages = Stages.of(policy)

        def between(made: fx.GraphModule) -> None:
            training(made, graph, on_grids=False)

        made = apply_policy(
            own_copy(graph) if stages.in_floats else graph,
            passes,
            policy,
            calibration=self._train,
            reconstruct=how,
            between=between if stages.in_floats else None,
        )
        if stages.on_grids:
            made = own_copy(made)
            training(made, graph, on_grids=True)
        return made

    def _prepared(self) -> tuple[fx.GraphModule, tuple[TunablePass, ...]]:
        """The graph to rewrite, and the passes; where bits alone are decided, trials share what quantizing it finds."""
        if self._shared is None:
            graph, passes = self._graph(), self._passes
            if all(isinstance(one, Quantize) for one in passes):
                graph = FoldBatchNorm()(graph.eval()).graph_module
                passes = tuple(
                    replace(one, findings=_findings(one, self._train is not None))
                    for one in passes
                    if isinstance(one, Quantize)
                )
            self._shared = graph, passes
        return self._shared

    def _cuts(self, policy: Policy) -> bool:
        return any(isinstance(one, PruneChannels) for one in self._passes) and any(k == "channels" for k, _ in policy)

    def _outputs(self, model: nn.Module) -> list[torch.Tensor]:
        if self._probe is None:
            return []
        with torch.no_grad(), eval_mode(model):
            output = model(*self._probe[0], **self._probe[1])
        leaves = pytree.tree_leaves(output)
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

    def _output_error(self, model: nn.Module) -> float:
        errors = []
        for mine, wanted in zip(self._outputs(model), self._wanted, strict=True):
            scale = float(wanted.double().norm())
            errors.append(float((mine.double() - wanted.double()).norm()) / max(scale, 1e-12))
        return math.fsum(errors) / len(errors)


def _findings(one: Quantize, has_data: bool) -> Findings:
    """What trials find of the graph they all quantize."""
    if not one.rounding or not has_data:
        return Findings()
    return Findings(RoundWeights(seed=one.seed).moments)


_GRAPHS: dict[str, fx.GraphModule] = {}
"""In a worker process: the graph of the evaluator that was used last."""


def _check_way(reconstruct: object) -> None:
    if not isinstance(reconstruct, (bool, Reconstruction)):
        raise SearchError(
            f"reconstruct is a {type(reconstruct).__name__}; give True, False or a fxopt.evaluate.Reconstruction."
        )


def _settling_batches(train: Loader, reconstruct: bool | Reconstruction) -> list[Any]:
    """The batches that trials use: a few, and more where least squares asks for samples and they fit."""
    options = reconstruct if isinstance(reconstruct, Reconstruction) else Reconstruction()
    samples = 0 if reconstruct is False else options.samples
    found: list[Any] = []
    seen = held = 0
    for batch in read(train, "train"):
        if len(found) >= SETTLING_BATCHES and (seen >= samples or held > _SETTLING_BYTES):
            break
        found.append(batch)
        tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        seen += len(tensors[0]) if tensors else 1
        held += sum(leaf.numel() * leaf.element_size() for leaf in tensors)
    return found


def _probe_inputs(gm: fx.GraphModule, seed: int) -> tuple[tuple[object, ...], dict[str, object]]:
    """Random inputs of the graph's own form: standard normal floats, zeros for integers."""
    return feed(gm, synthetic_batch(gm, seed), "The synthetic batch")
