"""Fine-tuning what a search has found, and the networks of its trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxopt.data import Loader
from fxopt.errors import FxoptError
from fxopt.graph.fake_quantize import ActivationQuantizer, WeightQuantizer, learn_scales
from fxopt.progress import Progress
from fxopt.training import FineTuning, History, fit, rehearse

__all__ = ["Tuning"]

_SCALES = {"lsq": "step sizes are learned", "pact": "clipping bounds are learned", "fixed": "scales are fixed"}


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune.

    Attributes:
        train: Batches of (input, label); None for no fine-tuning.
        epochs: Epochs.
        final_epochs: Epochs of the last training in floats; None for as many as the others have.
        loss: The loss; cross entropy of class scores if None.
        learning_rate: The highest learning rate.
        seed: The seed.
        options: Everything else; None distils class scores unless there is a loss of one's own.
    """

    train: Loader | None
    epochs: int
    loss: Callable[[Any, Any], torch.Tensor] | None
    learning_rate: float
    seed: int
    options: FineTuning | None = None
    final_epochs: int | None = None

    def __post_init__(self) -> None:
        """Look at the options.

        Raises:
            FxoptError: If they are of another type.
        """
        given: Any = self.options
        if given is not None and not isinstance(given, FineTuning):
            raise FxoptError(f"fine_tune is a {type(given).__name__}; give a fxopt.training.FineTuning, or None.")

    def epochs_of(self, *, on_grids: bool, final: bool) -> int:
        """Epochs of a training: none without data, and those of the last one where it is that.

        Args:
            on_grids: Whether the network is quantized.
            final: Whether nothing but bits is left to decide.
        """
        if self.train is None:
            return 0
        return self.epochs if on_grids or not final or self.final_epochs is None else self.final_epochs

    def rehearse(self, original: fx.GraphModule) -> None:
        """Notice what is wrong with data or loss before anything is searched.

        Raises:
            FxoptError: If fine-tuning could not take a step.
        """
        if self.train is not None:
            rehearse(
                original,
                self.train,
                epochs=max(self.epochs, self.final_epochs or 0),
                loss=self.loss,
                learning_rate=self.learning_rate,
                **self._taught(original, on_grids=False),
            )

    def for_trials(self, epochs: int) -> Tuning | None:
        """The same for the networks of trials, without an end by their scores; None if they are not trained."""
        if not epochs or self.train is None:
            return None
        options = dataclasses.replace(self._options, early_stop=None)
        return dataclasses.replace(self, epochs=epochs, options=options, final_epochs=None)

    def __call__(
        self,
        graph: fx.GraphModule,
        teacher: fx.GraphModule,
        *,
        on_grids: bool,
        final: bool = False,
        judge: Callable[[nn.Module], float] | None = None,
        checkpoint: Path | None = None,
        show: Progress | None = None,
    ) -> History | None:
        """Fine-tune ``graph`` in place, if there is something to train on; what happened.

        Args:
            graph: The graph.
            teacher: What it was made of.
            on_grids: Whether it is quantized: its scales are learned then, and class scores are all that it is taught.
            final: Whether nothing but bits is left to decide.
            judge: What an early stop goes by.
            checkpoint: Where the checkpoint is; None for none.
            show: Where to tell how far it is.
        """
        epochs = self.epochs_of(on_grids=on_grids, final=final)
        if self.train is None or not epochs:
            return None
        how = self._options
        step = "fine-tuning quantized" if on_grids else "fine-tuning"
        if on_grids and how.scales != "fixed" and not _has_powers_of_two(graph):
            learn_scales(graph, how.scales)
        if show is not None:
            show.start(step, epochs)
        history = fit(
            graph,
            self.train,
            epochs=epochs,
            loss=self.loss,
            learning_rate=self.learning_rate * (how.quantized_rate if on_grids else 1.0),
            optimizer=how.optimizer,
            schedule=how.schedule,
            momentum=how.momentum,
            weight_decay=how.weight_decay,
            clip=how.quantized_clip if on_grids else None,
            evaluate=judge if how.early_stop is not None else None,
            early_stop=how.early_stop,
            checkpoint=checkpoint,
            seed=self.seed,
            progress=None if show is None else lambda epoch, _, value: show.advance(step, 1, f"loss {value:.4f}"),
            **self._taught(teacher, on_grids=on_grids),
        )
        if show is not None:
            show.finish(step)
        return history

    @property
    def _options(self) -> FineTuning:
        if self.options is not None:
            return self.options
        return FineTuning() if self.loss is None else FineTuning(distillation=None)

    def _taught(self, teacher: fx.GraphModule, *, on_grids: bool) -> dict[str, Any]:
        how = self._options.distillation
        if how is None:
            return {}
        return {"teacher": teacher, "distillation": how.of_scores() if on_grids else how}

    def told(self, history: History, *, on_grids: bool) -> str:
        """What was done, in a few words."""
        words = [f"epochs: {len(history.loss)}"]
        if history.best_epoch:
            words.append(f"the best is {history.best_epoch}")
        if on_grids:
            words.append(_SCALES[self._options.scales])
        how = None if on_grids else self._options.distillation
        if how is not None and how.features:
            words.append(f"feature maps at {len(history.features)} places")
        if how is not None and how.attention:
            words.append(f"attention maps at {len(history.attention)} places")
        return ", ".join(words)


def _has_powers_of_two(graph: fx.GraphModule) -> bool:
    quantizers = (module for module in graph.modules() if isinstance(module, (ActivationQuantizer, WeightQuantizer)))
    return any(quantizer.scheme.power_of_two for quantizer in quantizers)
