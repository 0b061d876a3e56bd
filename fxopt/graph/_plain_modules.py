"""Which ATen calls torch's modules make, and how to build the module from the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["PARAMETRIC", "STATELESS", "Parametric", "plain_module"]

_aten = torch.ops.aten

Arguments = Mapping[str, Any]
Held = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Parametric:
    """How a parametric ATen call corresponds to a torch module.

    Attributes:
        classes: The module classes that make this call.
        inputs: Argument names that stay inputs of the module.
        state: Argument names that the module holds, under the same names.
        build: Makes the module on the meta device from the call's arguments and held tensors; None if the call
            says something that no such module says.
        config: Module attributes that must equal the call's arguments, as (attribute, argument).
    """

    classes: tuple[type[nn.Module], ...]
    inputs: tuple[str, ...]
    state: tuple[str, ...]
    build: Callable[[Arguments, Held], nn.Module | None]
    config: tuple[tuple[str, str], ...] = ()

    def fits(self, module: nn.Module, arguments: Arguments, held: Held) -> bool:
        """Whether ``module`` holds these very tensors and makes this very call."""
        if not isinstance(module, self.classes) or getattr(module, "padding_mode", "zeros") != "zeros":
            return False
        if any(getattr(module, name, None) is not tensor for name, tensor in held.items()):
            return False
        return all(_same(getattr(module, attribute), arguments[name]) for attribute, name in self.config)


def plain_module(spec: Parametric, arguments: Arguments, held: Held, existing: nn.Module | None) -> nn.Module | None:
    """A torch module that makes the call with exactly the held tensors, or None.

    Args:
        spec: What the call corresponds to.
        arguments: The call's arguments by name.
        held: The tensors that the module shall hold, by name.
        existing: The user's module at that path; its further parameters, buffers and mode are kept.
    """
    module = spec.build(arguments, held)
    if module is None:
        return None
    for name, tensor in held.items():
        if name in module._buffers:
            module._buffers[name] = tensor
        elif tensor is None or isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            return None
    if existing is None:
        return module.train(_is_training(arguments))
    for name, parameter in existing.named_parameters(recurse=False):
        if name not in held:
            module.register_parameter(name, parameter)
    for name, buffer in existing.named_buffers(recurse=False):
        if name not in held:
            module.register_buffer(name, buffer, persistent=name not in existing._non_persistent_buffers_set)
    if isinstance(existing, _BatchNorm) and isinstance(module, _BatchNorm):
        module.momentum = existing.momentum
    return module.train(existing.training)


def _is_training(arguments: Arguments) -> bool:
    return bool(arguments.get("training", False))


def _same(mine: Any, argument: Any) -> bool:
    if isinstance(mine, str) or isinstance(argument, str):
        return bool(mine == argument)
    wanted = list(argument) if isinstance(argument, (list, tuple)) else [argument]
    have = list(mine) if isinstance(mine, (list, tuple)) else [mine] * len(wanted)
    return have == (wanted * len(have) if len(wanted) == 1 else wanted)


def _convolution(cls: type[nn.Module], dimensions: int, transposed: bool = False) -> Parametric:
    def build(arguments: Arguments, held: Held) -> nn.Module | None:
        weight = held["weight"]
        if weight is None:
            return None
        groups = arguments["groups"]
        outer, inner = weight.shape[0], weight.shape[1] * groups
        options: dict[str, Any] = {
            name: _spread(arguments[name], dimensions)
            for name in ("stride", "padding", "dilation", *(("output_padding",) if transposed else ()))
        }
        channels = (outer, inner) if transposed else (inner, outer)
        if transposed:
            channels = (weight.shape[0], weight.shape[1] * groups)
        return cls(
            *channels,
            tuple(weight.shape[2:]),
            groups=groups,
            bias=held["bias"] is not None,
            device="meta",
            dtype=weight.dtype,
            **options,
        )

    names = ("stride", "padding", "dilation", "groups", *(("output_padding",) if transposed else ()))
    return Parametric((cls,), ("input",), ("weight", "bias"), build, tuple((name, name) for name in names))


def _spread(value: Any, dimensions: int) -> Any:
    if isinstance(value, str):
        return value
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(values * dimensions if len(values) == 1 else values)


def _build_linear(arguments: Arguments, held: Held) -> nn.Module | None:
    weight = held["weight"]
    if weight is None or weight.dim() != 2:
        return None
    return nn.Linear(weight.shape[1], weight.shape[0], held["bias"] is not None, device="meta", dtype=weight.dtype)


def _build_batch_norm(arguments: Arguments, held: Held) -> nn.Module | None:
    mean, weight = held["running_mean"], held["weight"]
    sample = arguments["input"].meta.get("val")
    classes = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if mean is None or not isinstance(sample, torch.Tensor) or sample.dim() not in classes:
        return None
    module = classes[sample.dim()](
        mean.shape[0],
        eps=arguments["eps"],
        momentum=arguments["momentum"],
        affine=weight is not None,
        device="meta",
        dtype=mean.dtype,
    )
    module._buffers["num_batches_tracked"] = None
    return module


def _build_layer_norm(arguments: Arguments, held: Held) -> nn.Module | None:
    weight, bias = held["weight"], held["bias"]
    shape = list(arguments["normalized_shape"])
    if not all(isinstance(size, int) for size in shape) or (weight is None and bias is not None):
        return None
    return nn.LayerNorm(shape, arguments["eps"], weight is not None, bias is not None, device="meta")


def _build_group_norm(arguments: Arguments, held: Held) -> nn.Module | None:
    weight = held["weight"]
    if weight is None or held["bias"] is None:
        return None
    return nn.GroupNorm(arguments["num_groups"], weight.shape[0], arguments["eps"], True, device="meta")


def _build_rms_norm(arguments: Arguments, held: Held) -> nn.Module | None:
    shape = list(arguments["normalized_shape"])
    if not all(isinstance(size, int) for size in shape):
        return None
    return nn.RMSNorm(shape, arguments["eps"], held["weight"] is not None, device="meta")


def _build_embedding(arguments: Arguments, held: Held) -> nn.Module | None:
    weight = held["weight"]
    if weight is None or arguments["sparse"] or arguments["scale_grad_by_freq"]:
        return None
    padding = arguments["padding_idx"]
    rows, width = weight.shape
    return nn.Embedding(rows, width, padding_idx=None if padding < 0 else padding, device="meta")


def _build_prelu(arguments: Arguments, held: Held) -> nn.Module | None:
    weight = held["weight"]
    return None if weight is None else nn.PReLU(weight.numel(), device="meta")


def _refuse(arguments: Arguments, held: Held) -> nn.Module | None:
    return None


_NORM_STATE = ("weight", "bias", "running_mean", "running_var")
_BATCH_NORM = Parametric(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ("input",), _NORM_STATE, _build_batch_norm, (("eps", "eps"),)
)

PARAMETRIC: dict[object, Parametric] = {
    _aten.conv1d.default: _convolution(nn.Conv1d, 1),
    _aten.conv1d.padding: _convolution(nn.Conv1d, 1),
    _aten.conv2d.default: _convolution(nn.Conv2d, 2),
    _aten.conv2d.padding: _convolution(nn.Conv2d, 2),
    _aten.conv3d.default: _convolution(nn.Conv3d, 3),
    _aten.conv3d.padding: _convolution(nn.Conv3d, 3),
    _aten.conv_transpose1d.default: _convolution(nn.ConvTranspose1d, 1, transposed=True),
    _aten.conv_transpose2d.input: _convolution(nn.ConvTranspose2d, 2, transposed=True),
    _aten.conv_transpose3d.input: _convolution(nn.ConvTranspose3d, 3, transposed=True),
    _aten.linear.default: Parametric((nn.Linear,), ("input",), ("weight", "bias"), _build_linear),
    _aten.batch_norm.default: _BATCH_NORM,
    _aten.instance_norm.default: Parametric(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), ("input",), _NORM_STATE, _refuse
    ),
    _aten.layer_norm.default: Parametric(
        (nn.LayerNorm,),
        ("input",),
        ("weight", "bias"),
        _build_layer_norm,
        (("normalized_shape", "normalized_shape"), ("eps", "eps")),
    ),
    _aten.group_norm.default: Parametric(
        (nn.GroupNorm,),
        ("input",),
        ("weight", "bias"),
        _build_group_norm,
        (("num_groups", "num_groups"), ("eps", "eps")),
    ),
    _aten.rms_norm.default: Parametric(
        (nn.RMSNorm,), ("input",), ("weight",), _build_rms_norm, (("normalized_shape", "normalized_shape"),)
    ),
    _aten.embedding.default: Parametric((nn.Embedding,), ("indices",), ("weight",), _build_embedding),
    _aten.prelu.default: Parametric((nn.PReLU,), ("self",), ("weight",), _build_prelu),
}
"""ATen calls that hold parameters."""


def _stateless() -> dict[object, tuple[type[nn.Module], ...]]:
    table: dict[object, tuple[type[nn.Module], ...]] = {
        _aten.relu.default: (nn.ReLU,),
        _aten.hardtanh.default: (nn.Hardtanh, nn.ReLU6),
        _aten.relu6.default: (nn.ReLU6,),
        _aten.leaky_relu.default: (nn.LeakyReLU,),
        _aten.elu.default: (nn.ELU,),
        _aten.celu.default: (nn.CELU,),
        _aten.selu.default: (nn.SELU,),
        _aten.silu.default: (nn.SiLU,),
        _aten.mish.default: (nn.Mish,),
        _aten.gelu.default: (nn.GELU,),
        _aten.hardswish.default: (nn.Hardswish,),
        _aten.hardsigmoid.default: (nn.Hardsigmoid,),
        _aten.sigmoid.default: (nn.Sigmoid,),
        _aten.tanh.default: (nn.Tanh,),
        _aten.softplus.default: (nn.Softplus,),
        _aten.softmax.int: (nn.Softmax,),
        _aten.dropout.default: (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        _aten.feature_dropout.default: (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        _aten.alpha_dropout.default: (nn.AlphaDropout,),
        _aten.feature_alpha_dropout.default: (nn.FeatureAlphaDropout,),
        _aten.avg_pool1d.default: (nn.AvgPool1d,),
        _aten.avg_pool2d.default: (nn.AvgPool2d,),
        _aten.avg_pool3d.default: (nn.AvgPool3d,),
        _aten.max_pool1d.default: (nn.MaxPool1d,),
        _aten.max_pool2d.default: (nn.MaxPool2d,),
        _aten.max_pool3d.default: (nn.MaxPool3d,),
        _aten.adaptive_avg_pool1d.default: (nn.AdaptiveAvgPool1d,),
        _aten.adaptive_avg_pool2d.default: (nn.AdaptiveAvgPool2d,),
        _aten.adaptive_avg_pool3d.default: (nn.AdaptiveAvgPool3d,),
        _aten.pixel_shuffle.default: (nn.PixelShuffle,),
        _aten.flatten.using_ints: (nn.Flatten,),
    }
    return table


STATELESS = _stateless()
"""ATen calls that a module without parameters makes as its whole forward."""
