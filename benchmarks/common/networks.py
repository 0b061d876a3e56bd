"""Real architectures with random weights, by name: ``package:architecture``.

Each is built in eval mode from one seed. Batch norms get statistics that are not those of a fresh layer, and parameters
that begin as zeros get small values, so that a mistake with them shows. A package that is not installed raises
ImportError when one of its networks is built.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import library, nn
from torch.nn.modules.batchnorm import _BatchNorm

IMAGE = (3, 224, 224)
LARGE = (3, 256, 256)
SMALL = (3, 32, 32)

# Image classifiers of pytorchcv, a few of each family, with the module that has them.
PYTORCHCV = {
    "alexnet": "alexnet",
    "cbam_resnet18": "cbamresnet",
    "darknet53": "darknet53",
    "densenet121": "densenet",
    "dpn68": "dpn",
    "efficientnet_b0": "efficientnet",
    "fbnet_cb": "fbnet",
    "ghostnet": "ghostnet",
    "hrnet_w18_small_v1": "hrnet",
    "igcv3_w1": "igcv3",
    "mixnet_s": "mixnet",
    "mnasnet_b1": "mnasnet",
    "mobilenet_w1": "mobilenet",
    "mobilenetv2_w1": "mobilenetv2",
    "mobilenetv3_large_w1": "mobilenetv3",
    "nasnet_4a1056": "nasnet",
    "octresnet10_ad2": "octresnet",
    "peleenet": "peleenet",
    "preresnet18": "preresnet",
    "proxylessnas_mobile": "proxylessnas",
    "regnetx004": "regnet",
    "resnesta50": "resnesta",
    "resnet18": "resnet",
    "resnet50": "resnet",
    "seresnet50": "seresnet",
    "shufflenetv2_w1": "shufflenetv2",
    "sknet50": "sknet",
    "squeezenet_v1_1": "squeezenet",
    "vgg16": "vgg",
}

# Those of pytorchcv with other inputs: segmentation, pose, centers, small images. Some are built for one size.
PYTORCHCV_SHAPES = {
    "centernet_resnet18_coco": ("centernet", LARGE),
    "inceptionv3": ("inceptionv3", (3, 299, 299)),
    "nin_cifar10": ("nin_cifar", SMALL),
    "pspnet_resnetd50b_voc": ("pspnet", LARGE),
    "segnet_cityscapes": ("segnet", LARGE),
    "simplepose_resnet18_coco": ("simplepose_coco", (3, 256, 192)),
    "unet_cityscapes": ("unet", LARGE),
    "wrn20_10_1bit_cifar10": ("wrn1bit_cifar", SMALL),
}
SIZED = {"centernet_resnet18_coco", "pspnet_resnetd50b_voc", "segnet_cityscapes", "unet_cityscapes"}

TIMM = {
    "convnext_atto": IMAGE,
    "fastvit_t8": LARGE,
    "mixer_s16_224": IMAGE,
    "mobilenetv4_conv_small": IMAGE,
    "vit_tiny_patch16_224": IMAGE,
}
TORCHVISION = {"mobilenet_v3_small": IMAGE, "vit_b_16": IMAGE}

# Of transformers: model class, its options, input shape of one sample, vocabulary (0: the input is an image).
OfTransformers: TypeAlias = tuple[str, dict[str, Any], tuple[int, ...], int]
TRANSFORMERS: dict[str, OfTransformers] = {
    "bert": (
        "BertForSequenceClassification",
        {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
        (128,),
        30522,
    ),
    "convnext": ("ConvNextForImageClassification", {"num_labels": 1000}, IMAGE, 0),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"n_layers": 3, "dim": 384, "n_heads": 6, "hidden_dim": 1536},
        (128,),
        30522,
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 4, "n_embd": 256, "n_head": 4, "use_cache": False}, (64,), 50257),
    "segformer": ("SegformerForSemanticSegmentation", {"num_labels": 19}, LARGE, 0),
    "swin": ("SwinForImageClassification", {"num_labels": 1000}, IMAGE, 0),
    "vit": (
        "ViTForImageClassification",
        {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        IMAGE,
        0,
    ),
}


class FirstOutput(nn.Module):
    """A network that gives the first of its outputs only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        """The first output."""
        return self.network(x)[0]


TINY = 1e-3


def stirred(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The network with small random values in the parameters that begin as zeros, or all but: scales of branches."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not (parameter.abs() > TINY).any():
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


@dataclass(frozen=True)
class Network:
    """An architecture.

    Attributes:
        make: Builds it.
        shape: Shape of one sample.
        vocabulary: Number of token ids where the input is text; 0 where it is an image.
    """

    make: Callable[[], nn.Module] = field(repr=False)
    shape: tuple[int, ...]
    vocabulary: int = 0

    def build(self, seed: int = 0) -> nn.Module:
        """The network in eval mode, its weights random."""
        torch.manual_seed(seed)
        model = self.make()
        generator = torch.Generator().manual_seed(seed)
        for norm in model.modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.normal_(0.0, 0.1, generator=generator)
                norm.running_var.uniform_(0.5, 1.5, generator=generator)
        return stirred(model, generator).eval()

    def example(self, batch: int, seed: int = 0) -> torch.Tensor:
        """Random input of ``batch`` samples."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return torch.randint(0, self.vocabulary, (batch, *self.shape), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator)


def of_pytorchcv(name: str, module: str, shape: tuple[int, ...] = IMAGE) -> Network:
    def make() -> nn.Module:
        options = {"in_size": shape[1:]} if name in SIZED else {}
        return getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)(**options)

    return Network(make, shape)


def of_timm(name: str, shape: tuple[int, ...]) -> Network:
    def make() -> nn.Module:
        declare_torchvision_operators()
        return importlib.import_module("timm").create_model(name, pretrained=False)

    return Network(make, shape)


def of_torchvision(name: str, shape: tuple[int, ...], **options: Any) -> Network:
    def make() -> nn.Module:
        declare_torchvision_operators()
        return importlib.import_module("torchvision.models").get_model(name, weights=None, **options)

    return Network(make, shape)


def of_transformers(found: OfTransformers, output: Callable[[nn.Module], nn.Module]) -> Network:
    """A network of transformers, or the encoder of one, of which ``output`` gives a part only."""
    kind, options, shape, vocabulary = found

    def make() -> nn.Module:
        declare_torchvision_operators()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        package = importlib.import_module("transformers")
        if kind.endswith("Encoder"):
            family = kind.removesuffix("Encoder")
            held = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
            return output(getattr(held, kind)(getattr(package, f"{family}Config")(**options)))
        model = getattr(package, kind)
        return output(model(model.config_class(**options)))

    return Network(make, shape, vocabulary)


def declare_torchvision_operators() -> None:
    """Let a torchvision that was compiled for another torch be imported.

    Its import describes two compiled operators, which are then missing; no network here calls them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        LIBRARY.append(library.Library("torchvision", "FRAGMENT"))
        LIBRARY[-1].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARY[-1].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


LIBRARY: list[library.Library] = []

NETWORKS: dict[str, Network] = {
    **{f"pytorchcv:{name}": of_pytorchcv(name, module) for name, module in PYTORCHCV.items()},
    **{f"pytorchcv:{name}": of_pytorchcv(name, *found) for name, found in PYTORCHCV_SHAPES.items()},
    **{f"timm:{name}": of_timm(name, shape) for name, shape in TIMM.items()},
    **{f"torchvision:{name}": of_torchvision(name, shape) for name, shape in TORCHVISION.items()},
    **{f"transformers:{name}": of_transformers(found, FirstOutput) for name, found in TRANSFORMERS.items()},
}
