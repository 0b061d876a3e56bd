"""The one table of what an operator means.

Everything that fxopt knows of an operator stands here: what kind of work it is to a cost model, how channels flow
through it, whether it is an activation function, whether a fusing runtime merges it into its producer. What is not in
the table is a *barrier*: its channels are frozen, its cost is reported as unknown, and nothing crashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

__all__ = [
    "BARRIER",
    "OpSemantics",
    "activation_names",
    "arguments",
    "is_activation",
    "is_known",
    "register_function",
    "register_module",
    "semantics",
]


@dataclass(frozen=True)
class OpSemantics:
    """What an operator means.

    Attributes:
        name: The operator's name, for people.
        kind: What a cost model calls the work: ``conv``, ``linear``, ``matmul``, ``elementwise``, ``pool``, ``norm``,
            ``softmax``, ``embedding``, ``copy``, ``resize``; ``none`` for what costs nothing, ``unknown`` for a
            barrier.
        flow: How channels flow, a rule of :mod:`fxopt.graph.channels`; ``barrier`` freezes them.
        activation: Whether it is a unary, channel-wise activation function.
        fuses: Whether a fusing runtime merges it into the operator that makes its input.
        clamps: Whether it is an activation that is linear but for a kink or two, as ReLU.
    """

    name: str
    kind: str
    flow: str
    activation: bool = False
    fuses: bool = False
    clamps: bool = False

    @property
    def is_view(self) -> bool:
        """Whether what it gives is the memory of what it reads, for a cost model."""
        return self.kind == "none" or self.flow == "split"


BARRIER = OpSemantics("unknown", "unknown", "barrier")

_MODULES: dict[type[nn.Module], OpSemantics] = {}
_FUNCTIONS: dict[str, OpSemantics] = {}


def register_module(cls: type[nn.Module], semantics: OpSemantics) -> None:
    """Say what a leaf module class (and its subclasses) means."""
    _MODULES[cls] = semantics


def register_function(name: str, semantics: OpSemantics) -> None:
    """Say what an ATen operator means.

    Args:
        name: The operator's name, without overload for all its overloads: ``aten::add`` or ``mylib::op``.
        semantics: Its meaning.
    """
    _FUNCTIONS[name] = semantics


def semantics(gm: fx.GraphModule, node: fx.Node) -> OpSemantics:
    """The meaning of a node; a barrier if the table does not know the operator."""
    if node.op == "call_module":
        return _module_semantics(type(gm.get_submodule(str(node.target))))
    if node.op in ("placeholder", "get_attr", "output"):
        return _ENDS[node.op]
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable:
            return OpSemantics(str(node.target), "unknown", "barrier")
        known = _FUNCTIONS.get(node.target._schema.name)
        return known or OpSemantics(str(node.target), "unknown", "barrier")
    if getattr(node.target, "__name__", "") == "getitem":
        return OpSemantics("getitem", "none", "getitem")
    if not any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves(node.meta.get("val"))):
        return OpSemantics(getattr(node.target, "__name__", str(node.target)), "none", "scalar")
    return OpSemantics(str(node.target), "unknown", "barrier")


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by name, an ATen call's defaults filled in; those of other calls by their position."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    found: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = index < len(node.args)
        found[argument.name] = node.args[index] if given else node.kwargs.get(argument.name, argument.default_value)
    return found


def is_activation(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a unary, channel-wise activation function."""
    return semantics(gm, node).activation


def activation_names() -> list[str]:
    """Names of all activation functions, modules and ATen operators, in alphabetical order."""
    return sorted({known.name for table in (_MODULES, _FUNCTIONS) for known in table.values() if known.activation})


def is_known(module: nn.Module) -> bool:
    """Whether a module is one that the table knows, of whatever it is made."""
    return _module_semantics(type(module)).kind != BARRIER.kind


def _module_semantics(cls: type[nn.Module]) -> OpSemantics:
    for base in cls.__mro__:
        if base in _MODULES:
            return _MODULES[base]
    return OpSemantics(cls.__name__, "unknown", "barrier")


_ENDS = {
    "placeholder": OpSemantics("input", "none", "input"),
    "get_attr": OpSemantics("parameter", "none", "parameter"),
    "output": OpSemantics("output", "none", "output"),
}


_ACTIVATION_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.SiLU,
    nn.Mish,
    nn.GELU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
)

_CLAMP_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU)


def _fill_modules() -> None:
    for dimension in ("1d", "2d", "3d"):
        named = {
            f"Conv{dimension}": ("conv", "conv", False),
            f"ConvTranspose{dimension}": ("conv", "conv_transpose", False),
            f"BatchNorm{dimension}": ("norm", "norm_channels", True),
            f"InstanceNorm{dimension}": ("norm", "norm_channels", False),
            f"MaxPool{dimension}": ("pool", "spatial", False),
            f"AvgPool{dimension}": ("pool", "spatial", False),
            f"AdaptiveAvgPool{dimension}": ("pool", "spatial", False),
            f"AdaptiveMaxPool{dimension}": ("pool", "spatial", False),
            f"Dropout{dimension}": ("none", "unary", False),
        }
        for name, (kind, flow, fuses) in named.items():
            register_module(getattr(nn, name), OpSemantics(name, kind, flow, fuses=fuses))
    for cls, kind, flow in (
        (nn.Linear, "linear", "linear"),
        (nn.Embedding, "embedding", "embedding"),
        (nn.LayerNorm, "norm", "norm_across"),
        (nn.GroupNorm, "norm", "norm_groups"),
        (nn.RMSNorm, "norm", "norm_across"),
        (nn.Softmax, "softmax", "softmax"),
        (nn.Flatten, "none", "reshape"),
        (nn.Identity, "none", "unary"),
        (nn.Dropout, "none", "unary"),
        (nn.AlphaDropout, "none", "unary"),
        (nn.FeatureAlphaDropout, "none", "unary"),
        (nn.PixelShuffle, "copy", "pixel_shuffle"),
        (nn.PixelUnshuffle, "copy", "pixel_unshuffle"),
        (nn.ChannelShuffle, "copy", "channel_shuffle"),
        (nn.MaxUnpool2d, "copy", "unpool"),
        (nn.LogSoftmax, "softmax", "softmax"),
        (nn.LogSigmoid, "elementwise", "unary"),
        (nn.Softsign, "elementwise", "unary"),
        (nn.Threshold, "elementwise", "unary"),
        (nn.ZeroPad2d, "copy", "spatial"),
        (nn.ReflectionPad2d, "copy", "spatial"),
        (nn.ReplicationPad2d, "copy", "spatial"),
        (nn.Upsample, "resize", "spatial"),
    ):
        register_module(cls, OpSemantics(cls.__name__, kind, flow))
    prelu = OpSemantics("PReLU", "elementwise", "norm_channels", activation=True, fuses=True, clamps=True)
    register_module(nn.PReLU, prelu)
    for activation in _ACTIVATION_MODULES:
        clamps = activation in _CLAMP_MODULES
        meaning = OpSemantics(activation.__name__, "elementwise", "unary", activation=True, fuses=True, clamps=clamps)
        register_module(activation, meaning)


_CLAMPS = "relu relu6 hardtanh leaky_relu"
_ACTIVATIONS = "elu celu selu silu mish gelu hardswish hardsigmoid sigmoid tanh softplus"
_UNARY = (
    "neg abs exp log sqrt rsqrt reciprocal erf sign floor ceil round sin cos clamp clamp_min clamp_max square "
    "tan isnan isfinite logit log1p expm1 log_sigmoid hardshrink softshrink bitwise_not nan_to_num "
    "trunc frac isinf isposinf isneginf sgn exp2 log2 log10 sinh cosh asin acos atan asinh acosh atanh erfc erfinv "
    "lgamma digamma threshold rrelu rand_like randn_like bernoulli absolute negative positive fix arctan"
)
_UNARY_FREE = (
    "contiguous clone to alias detach detach_ lift_fresh_copy dropout feature_dropout alpha_dropout "
    "feature_alpha_dropout type_as _to_copy zeros_like ones_like full_like empty_like"
)
_BINARY = (
    "add sub mul div rsub maximum minimum pow remainder fmod floor_divide atan2 where masked_fill lerp addcmul addcdiv "
    "fmax fmin logaddexp hypot copysign heaviside xlogy special_xlogy multiply divide true_divide subtract float_power"
)
_REDUCE = (
    "var std amin min prod logsumexp argmax argmin any all var_mean std_mean linalg_vector_norm median nanmean nansum "
    "count_nonzero aminmax"
)
_COMPARE = (
    "eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_xor "
    "__and__ __or__ __xor__ greater greater_equal less less_equal not_equal isclose"
)
_NARY_RULES = {
    "view": ("none", "reshape"),
    "reshape": ("none", "reshape"),
    "_unsafe_view": ("none", "reshape"),
    "flatten": ("none", "reshape"),
    "reshape_as": ("none", "reshape_as"),
    "view_as": ("none", "reshape_as"),
    "unflatten": ("none", "reshape"),
    "squeeze": ("none", "reshape"),
    "unsqueeze": ("none", "reshape"),
    "permute": ("copy", "permute"),
    "transpose": ("copy", "permute"),
    "t": ("copy", "permute"),
    "expand": ("none", "expand"),
    "expand_as": ("none", "broadcast"),
    "cat": ("copy", "cat"),
    "chunk": ("copy", "split"),
    "split": ("copy", "split"),
    "split_with_sizes": ("copy", "split"),
    "slice": ("copy", "slice"),
    "narrow": ("copy", "narrow"),
    "select": ("copy", "select"),
    "stack": ("copy", "stack"),
    "unbind": ("copy", "unbind"),
    "roll": ("copy", "roll"),
    "flip": ("copy", "flip"),
    "rot90": ("copy", "roll"),
    "tile": ("copy", "repeat"),
    "repeat_interleave": ("copy", "repeat_interleave"),
    "swapaxes": ("copy", "permute"),
    "swapdims": ("copy", "permute"),
    "movedim": ("copy", "move_dim"),
    "moveaxis": ("copy", "move_dim"),
    "unfold": ("copy", "windows"),
    "col2im": ("copy", "fold"),
    "tril": ("copy", "last_two"),
    "triu": ("copy", "last_two"),
    "prelu": ("elementwise", "prelu"),
    "grid_sampler": ("resize", "sample"),
    "grid_sampler_2d": ("resize", "sample"),
    "index": ("copy", "index"),
    "index_select": ("copy", "index_select"),
    "concat": ("copy", "cat"),
    "concatenate": ("copy", "cat"),
    "gather": ("copy", "barrier"),
    "repeat": ("copy", "repeat"),
    "pad": ("copy", "pad"),
    "constant_pad_nd": ("copy", "pad"),
    "mean": ("pool", "reduce"),
    "sum": ("pool", "reduce"),
    "amax": ("pool", "reduce"),
    "max": ("pool", "reduce"),
    "cumsum": ("elementwise", "along"),
    "cumprod": ("elementwise", "along"),
    "logcumsumexp": ("elementwise", "along"),
    "topk": ("elementwise", "along"),
    "sort": ("elementwise", "along"),
    "argsort": ("elementwise", "along"),
    "softmax": ("softmax", "softmax"),
    "_softmax": ("softmax", "softmax"),
    "log_softmax": ("softmax", "softmax"),
    "matmul": ("matmul", "matmul"),
    "bmm": ("matmul", "matmul"),
    "mm": ("matmul", "matmul"),
    "addmm": ("matmul", "addmm"),
    "baddbmm": ("matmul", "barrier"),
    "scaled_dot_product_attention": ("attention", "attention"),
    "linear": ("linear", "functional_linear"),
    "conv1d": ("conv", "functional_conv"),
    "conv2d": ("conv", "functional_conv"),
    "conv3d": ("conv", "functional_conv"),
    "conv_transpose1d": ("conv", "functional_conv"),
    "conv_transpose2d": ("conv", "functional_conv"),
    "conv_transpose3d": ("conv", "functional_conv"),
    "layer_norm": ("norm", "norm_across"),
    "group_norm": ("norm", "norm_groups"),
    "rms_norm": ("norm", "norm_across"),
    "batch_norm": ("norm", "functional_norm"),
    "instance_norm": ("norm", "functional_norm"),
    "embedding": ("embedding", "functional_embedding"),
    "max_pool2d_with_indices": ("pool", "spatial"),
    "max_unpool2d": ("copy", "unpool"),
    "pixel_shuffle": ("copy", "pixel_shuffle"),
    "pixel_unshuffle": ("copy", "pixel_unshuffle"),
    "channel_shuffle": ("copy", "channel_shuffle"),
    "im2col": ("copy", "unfold"),
}
_SPATIAL = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
)
_RESIZE = (
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d "
    "upsample_linear1d upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
_MAKERS = (
    "arange zeros ones full new_ones new_zeros new_full empty scalar_tensor linspace new_empty eye rand randn randint "
    "randperm tril_indices triu_indices"
)


def _fill_functions() -> None:
    def fill(names: str, kind: str, flow: str, **flags: bool) -> None:
        for name in names.split():
            register_function(f"aten::{name}", OpSemantics(name, kind, flow, **flags))

    fill(_CLAMPS, "elementwise", "unary", activation=True, fuses=True, clamps=True)
    fill(_ACTIVATIONS, "elementwise", "unary", activation=True, fuses=True)
    fill(_UNARY, "elementwise", "unary")
    fill(_UNARY_FREE, "none", "unary")
    fill(_BINARY, "elementwise", "broadcast")
    fill(_COMPARE, "elementwise", "broadcast")
    fill(_SPATIAL, "pool", "spatial")
    fill(_REDUCE, "pool", "reduce")
    fill(_RESIZE, "resize", "spatial")
    fill(_MAKERS, "none", "constant")
    fill("sym_size size sym_numel", "none", "scalar")
    for name, (kind, flow) in _NARY_RULES.items():
        fill(name, kind, flow)


_fill_modules()
_fill_functions()
