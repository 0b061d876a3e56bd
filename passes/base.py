"""What a pass is: a frozen dataclass that takes a verified graph and gives a verified graph back.

The life of ``some_pass(gm)``:

1. ``verify(gm)``, then the pass's own ``requires(gm)``.
2. ``call`` works on a private copy of the graph (the tensors are shared), so that a pass that fails, and one that
   does not, leave the graph they were given as it was.
3. ``verify`` and the pass's own ``ensures`` look at the *result*.
4. A pass that says it modified nothing gives back the very graph it was given.

Passes are instances of torch's ``PassBase``: they run in torch's ``PassManager``, and torch's passes run in a
:class:`Pipeline`.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper

from fxopt.decisions import Capabilities, Choice, Key, Policy, SearchSpace
from fxopt.errors import FxoptError, PassError, VerifyError
from fxopt.graph import edit, verify
from fxopt.graph.edit import fork
from fxopt.graph.shapes import TRACE_META

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Pass", "PassResult", "Pipeline", "Refusal", "TunablePass"]


@dataclass(frozen=True)
class Refusal:
    """A place where a pass could have worked and did not.

    Attributes:
        node: Name of the node.
        site: Module path, or the name of the operator for a call of a function.
        reason: Why, in words.
    """

    node: str
    site: str
    reason: str


@dataclass(frozen=True)
class Pass(PassBase):
    """A rewrite of a graph. Its fields are its options.

    A subclass is a frozen dataclass with a :attr:`name` and :meth:`call`; it may check more before and after in
    :meth:`requires` and :meth:`ensures`. ``call`` may edit the graph that it is given, through ``fxopt.graph.edit``.

    Attributes:
        name: The pass's name on the command line and in recipes: verb and object, with dashes.
    """

    name: ClassVar[str] = ""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Check, run on a private copy, check the result.

        Args:
            graph_module: A graph from ``fxopt.trace``. It is not changed.

        Returns:
            The new graph and True, or the given graph and False.

        Raises:
            VerifyError: If the graph is not canonical before the pass.
            PassError: If the pass fails or its result is not canonical.
            FxoptError: Whatever the pass raises on purpose.
        """
        verify(graph_module)
        self.requires(graph_module)
        result = self._run(graph_module)
        if not result.modified:
            return PassResult(graph_module, False)
        try:
            verify(result.graph_module)
        except VerifyError as failure:
            raise PassError(f"{self._title} left a graph that is not canonical: {failure}") from failure
        self.ensures(result.graph_module)
        return result

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """The rewrite itself.

        Args:
            graph_module: A verified graph that the pass may edit in place (its tensors excepted).

        Returns:
            The edited graph and whether it differs from what it was.
        """

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check what the pass needs besides a verified graph; raise PassError if it is missing."""

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check what the pass promises of its result besides a verified graph; raise PassError if it is broken."""

    @property
    def _title(self) -> str:
        return f"Pass {_name_of(self)!r}"

    def _workspace(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return fork(graph_module)

    def _run(self, graph_module: fx.GraphModule) -> PassResult:
        try:
            result: Any = self.call(self._workspace(graph_module))
        except FxoptError:
            raise
        except Exception as failure:
            raise PassError(f"{self._title} failed: {type(failure).__name__}: {failure}") from failure
        if isinstance(result, PassResult) and isinstance(result.graph_module, fx.GraphModule):
            return result
        raise PassError(f"{self._title} returned {result!r}; return a PassResult(graph_module, modified).")


@dataclass(frozen=True)
class TunablePass(Pass):
    """A pass that has something to decide.

    It declares its decisions, and a policy makes them; without a policy everything stays at its default.

    Attributes:
        policy: The decisions made, possibly among those of other passes; what is left out is default.
        kinds: The kinds of decisions that this pass makes. Decisions of other kinds are not its business.
    """

    policy: Policy | None = None
    kinds: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Take any mapping for a policy."""
        policy: Any = self.policy
        if policy is not None and not isinstance(policy, Policy):
            object.__setattr__(self, "policy", Policy(policy))

    @abstractmethod
    def search_space(self, graph_module: fx.GraphModule, capabilities: Capabilities | None = None) -> SearchSpace:
        """What can be decided about a graph, which is not changed.

        Args:
            graph_module: A graph from ``fxopt.trace``.
            capabilities: What the target can run; None for no restriction.
        """

    def with_policy(self, policy: Policy) -> Self:
        """The same pass with another policy."""
        return dataclasses.replace(self, policy=policy)

    @property
    def own_choices(self) -> dict[Key, Choice]:
        """The choices of the policy that are of this pass's kinds."""
        return {} if self.policy is None else dict(self.policy.only(self.kinds))


@dataclass(frozen=True)
class _Foreign(Pass):
    """Any other pass: torch's, or a plain function of a GraphModule that may return nothing."""

    function: Callable[[fx.GraphModule], Any]

    @property
    def _title(self) -> str:
        return f"Pass {_name_of(self.function)!r}"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        result = pass_result_wrapper(self.function)(graph_module)
        if result is None or not isinstance(result.graph_module, fx.GraphModule):
            raise PassError(f"{self._title} returned no GraphModule; return a PassResult, a GraphModule or None.")
        if result.modified:
            result.graph_module.meta.setdefault(TRACE_META, graph_module.meta.get(TRACE_META, {}))
            edit.finish(result.graph_module)
        return result


@dataclass(frozen=True)
class Pipeline(Pass):
    """Passes one after the other: fxopt's, torch's, or plain functions. Itself a pass.

    Attributes:
        passes: The passes in order. A function that returns no PassResult counts as one that modified the graph.

    Example:
        >>> from fxopt.passes import Canonicalize, FoldBatchNorm
        >>> pipeline = Pipeline((Canonicalize(), FoldBatchNorm()))
    """

    name: ClassVar[str] = "pipeline"
    passes: tuple[Callable[[fx.GraphModule], Any], ...] = ()

    def __post_init__(self) -> None:
        """Take any sequence of passes, and refuse what cannot be called.

        Raises:
            PassError: If something among the passes is no pass.
        """
        if callable(self.passes) or not isinstance(self.passes, Iterable):
            raise PassError(f"A Pipeline takes a sequence of passes, got {self.passes!r}; write Pipeline((a, b)).")
        object.__setattr__(self, "passes", tuple(self.passes))
        for item in self.passes:
            if isinstance(item, type) or not callable(item):
                raise PassError(f"A Pipeline takes passes and functions, got {item!r}; give instances, not classes.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the passes in order.

        Raises:
            PassError: If one fails; names it and those already run.
        """
        done: list[str] = []
        modified = False
        for item in self.passes:
            step = item if isinstance(item, Pass) else _Foreign(item)
            try:
                result = step(graph_module)
            except FxoptError as failure:
                after = f"after {', '.join(done)}" if done else "the first pass"
                raise PassError(f"The pipeline stopped at {_name_of(item)!r}, {after}: {failure}") from failure
            graph_module, modified = result.graph_module, modified or result.modified
            done.append(_name_of(item))
        return PassResult(graph_module, modified)

    def _workspace(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Every pass works on a copy of its own already."""
        return graph_module


def _name_of(item: object) -> str:
    if isinstance(item, Pass) and item.name:
        return item.name
    if isinstance(item, PassManager):
        return f"PassManager({', '.join(_name_of(inner) for inner in item.passes)})"
    return str(item.__name__) if inspect.isfunction(item) else type(item).__name__
