"""Learning from a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxopt.data import call_model
from fxopt.graph.taps import Taps
from fxopt.training._losses import attention_distance, feature_distance, score_distance
from fxopt.training._options import Distillation
from fxopt.training._places import Place, shared_places

__all__ = ["Distiller"]


class Distiller:
    """A student and its teacher.

    Args:
        student: The model in training.
        teacher: What it learns from; in eval mode, and never changed.
        how: What is learnt.

    Attributes:
        student: Computes what the student does, and is to be called in its place.
        features: Places where feature maps are compared.
        attention: Places where attention maps are.

    Raises:
        DataError: If graphs are needed and there are none.
        UnknownNameError: If a pattern matches nothing that both graphs have.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, how: Distillation) -> None:
        self.student, self._teacher, self._how = student, teacher, how
        self.features: list[Place] = []
        self.attention: list[Place] = []
        if not how.looks_inside:
            return
        places = shared_places(student, teacher, how.sites)
        self.features = [place for place in places if place.equal] if how.features else []
        self.attention = places if how.attention else []
        # Graphs both, or there would be no places to share.
        graphs: tuple[Any, Any] = student, teacher
        self._mine = Taps(graphs[0], dict.fromkeys(place.student for place in places))
        self._theirs = Taps(graphs[1], dict.fromkeys(place.teacher for place in places))
        self.student, self._teacher = self._mine.graph, self._theirs.graph

    def loss(self, own: torch.Tensor, output: Any, inputs: Any) -> torch.Tensor:
        """The whole loss of a batch.

        Args:
            own: The loss by the labels, one element.
            output: What ``student`` gave for the batch, in its last call.
            inputs: The inputs of the batch.

        Raises:
            DataError: If the teacher fails on the inputs, its scores are of another shape than the student's, or there
                are no class scores and they are asked for.
        """
        with torch.no_grad():
            wanted = call_model(self._teacher, inputs, "train")
        whole = own.squeeze()
        if self._how.logits:
            whole = torch.lerp(whole, score_distance(output, wanted, self._how.temperature), self._how.logits)
        for weight, distances in (
            (self._how.features, [self._feature(place) for place in self.features]),
            (self._how.attention, [self._attention(place) for place in self.attention]),
        ):
            if distances:
                whole = whole + weight * torch.stack(distances).mean()
        return whole

    def _feature(self, place: Place) -> torch.Tensor:
        return feature_distance(*self._values(place))

    def _attention(self, place: Place) -> torch.Tensor:
        return attention_distance(*self._values(place), place.channels)

    def _values(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        return self._mine.values[place.student], self._theirs.values[place.teacher]
