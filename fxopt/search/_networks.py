"""Small multi-layer perceptrons and Adam, in NumPy.

Networks of a few hundred units on a few hundred rows are what the agents need. In NumPy an update is a dozen matrix
products, with no graph to build; the package of engines needs no torch; and on one thread the result is the same to the
last bit each time.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fxopt.errors import SearchError

__all__ = ["Adam", "Array", "Perceptron", "decode_array", "encode_array"]

Array: TypeAlias = npt.NDArray[np.float32]

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class Perceptron:
    """Fully connected layers with ReLU between them.

    Args:
        sizes: Inputs, hidden units of each layer, outputs.
        rng: Draws the weights: uniform, of the width that He et al. 2015 give for ReLU; the last layer's are small, so
            that a fresh network's output is nearly constant.
        output: ``"sigmoid"`` for outputs in (0, 1), else ``"linear"``.

    Attributes:
        weights: Weight and bias of each layer, in order; weights of shape ``(inputs, outputs)``.
    """

    def __init__(
        self, sizes: Sequence[int], rng: np.random.Generator, output: Literal["linear", "sigmoid"] = "linear"
    ) -> None:
        self.output = output
        self.weights: list[Array] = []
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            bound = np.sqrt(6.0 / inputs) * (0.01 if layer == len(sizes) - 2 else 1.0)
            self.weights.append(rng.uniform(-bound, bound, (inputs, outputs)).astype(np.float32))
            self.weights.append(np.zeros(outputs, dtype=np.float32))

    def __call__(self, inputs: Array) -> Array:
        """The outputs for rows of inputs."""
        return self.forward(inputs)[0]

    def forward(self, inputs: Array) -> tuple[Array, list[Array]]:
        """The outputs, and what :meth:`backward` needs of each layer."""
        kept = [inputs]
        value = inputs
        for layer in range(0, len(self.weights), 2):
            value = value @ self.weights[layer] + self.weights[layer + 1]
            if layer < len(self.weights) - 2:
                np.maximum(value, 0.0, out=value)
                kept.append(value)
        if self.output == "sigmoid":
            value = _sigmoid(value)
        kept.append(value)
        return value, kept

    def backward(self, kept: Sequence[Array], slope: Array, *, inputs_only: bool = False) -> tuple[list[Array], Array]:
        """Gradients of the weights, in their order, and of the inputs, from the gradient of the outputs."""
        gradients: list[Array] = []
        if self.output == "sigmoid":
            slope = slope * kept[-1] * (1.0 - kept[-1])
        for layer in range(len(self.weights) - 2, -1, -2):
            source = kept[layer // 2]
            if not inputs_only:
                gradients += [slope.sum(axis=0), source.T @ slope]
            slope = slope @ self.weights[layer].T
            if layer:
                slope *= source > 0.0
        return gradients[::-1], slope


class Adam:
    """Adam (Kingma and Ba 2015) on a list of arrays, in place.

    Args:
        weights: The arrays.
        rate: The learning rate.
    """

    def __init__(self, weights: Sequence[Array], rate: float) -> None:
        self.weights = weights
        self.rate = rate
        self.steps = 0
        self.moments = [[np.zeros_like(weight) for weight in weights] for _ in _BETAS]

    def step(self, gradients: Sequence[Array]) -> None:
        """Go down the gradients."""
        self.steps += 1
        first, second = (1.0 - beta**self.steps for beta in _BETAS)
        rate = np.float32(self.rate * np.sqrt(second) / first)
        epsilon = np.float32(_EPSILON * np.sqrt(second))
        for weight, gradient, mean, square in zip(self.weights, gradients, *self.moments, strict=True):
            mean += (1.0 - _BETAS[0]) * (gradient - mean)
            square += (1.0 - _BETAS[1]) * (gradient * gradient - square)
            weight -= rate * mean / (np.sqrt(square) + epsilon)

    def state(self) -> dict[str, Any]:
        """Steps and moments, as JSON-ready data."""
        return {"steps": self.steps, "moments": [[encode_array(one) for one in moment] for moment in self.moments]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.steps = int(state["steps"])
        for moments, saved in zip(self.moments, state["moments"], strict=True):
            for moment, text in zip(moments, saved, strict=True):
                moment[...] = decode_array(text, moment.shape)


def encode_array(array: Array) -> str:
    """An array as text: its bytes, little-endian float32, in base 64."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode("ascii")


def decode_array(text: str, shape: tuple[int, ...]) -> Array:
    """The array of a known shape that :func:`encode_array` wrote.

    Raises:
        SearchError: If the text holds another number of values.
    """
    values = np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
    if values.size != int(np.prod(shape)):
        raise SearchError(f"A saved array has {values.size} values where {shape} are needed; was it saved otherwise?")
    return values.reshape(shape)


def _sigmoid(value: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * value)), dtype=value.dtype)
