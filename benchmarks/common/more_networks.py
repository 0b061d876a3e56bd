"""Further architectures with random weights, of other wirings than those of :mod:`common.networks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from common.networks import (
    IMAGE,
    LARGE,
    SMALL,
    Network,
    OfTransformers,
    of_pytorchcv,
    of_timm,
    of_torchvision,
    of_transformers,
)

PYTORCHCV = {
    "airnet50_1x64d_r2": ("airnet", IMAGE),
    "bagnet9": ("bagnet", IMAGE),
    "bninception": ("bninception", IMAGE),
    "diracnet18v2": ("diracnetv2", IMAGE),
    "dla34": ("dla", IMAGE),
    "drnc26": ("drn", IMAGE),
    "espnetv2_wd2": ("espnetv2", IMAGE),
    "hardnet39ds": ("hardnet", IMAGE),
    "ibnb_resnet50": ("ibnbresnet", IMAGE),
    "inceptionv4": ("inceptionv4", (3, 299, 299)),
    "menet108_8x1_g3": ("menet", IMAGE),
    "rir_cifar10": ("rir_cifar", SMALL),
    "resnext26_32x4d": ("resnext", IMAGE),
    "selecsls42b": ("selecsls", IMAGE),
    "senet16": ("senet", IMAGE),
    "shufflenet_g2_w1": ("shufflenet", IMAGE),
    "spnasnet": ("spnasnet", IMAGE),
    "vovnet27s": ("vovnet", IMAGE),
    "xception": ("xception", (3, 299, 299)),
    "shakedropresnet20_cifar10": ("shakedropresnet_cifar", SMALL),
}
TIMM = {
    "beit_base_patch16_224": IMAGE,
    "cait_xxs24_224": IMAGE,
    "coat_tiny": IMAGE,
    "coatnet_nano_rw_224": IMAGE,
    "convmixer_768_32": IMAGE,
    "crossvit_9_240": (3, 240, 240),
    "cspdarknet53": LARGE,
    "davit_tiny": IMAGE,
    "edgenext_xx_small": LARGE,
    "efficientformer_l1": IMAGE,
    "efficientvit_b0": IMAGE,
    "eva02_tiny_patch14_224": IMAGE,
    "gcresnet33ts": LARGE,
    "gmlp_s16_224": IMAGE,
    "levit_128s": IMAGE,
    "mobileone_s0": IMAGE,
    "mobilevitv2_050": LARGE,
    "nf_regnet_b0": (3, 192, 192),
    "pit_ti_224": IMAGE,
    "poolformer_s12": IMAGE,
    "pvt_v2_b0": IMAGE,
    "regnety_002": IMAGE,
    "repvgg_a0": IMAGE,
    "res2net50_26w_4s": IMAGE,
    "resnest14d": IMAGE,
    "resnetv2_50": IMAGE,
    "rexnet_100": IMAGE,
    "skresnet18": IMAGE,
    "swin_tiny_patch4_window7_224": IMAGE,
    "tnt_s_patch16_224": IMAGE,
    "twins_pcpvt_small": IMAGE,
    "volo_d1_224": IMAGE,
    "xcit_nano_12_p8_224": IMAGE,
}
TORCHVISION = {
    "convnext_tiny": IMAGE,
    "densenet121": IMAGE,
    "maxvit_t": IMAGE,
    "resnet50": IMAGE,
    "shufflenet_v2_x0_5": IMAGE,
    "swin_t": IMAGE,
    "swin_v2_t": IMAGE,
}
_SMALL_TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 500,
}
_GROUPED = {**_SMALL_TEXT, "num_key_value_heads": 2, "use_cache": False}
TRANSFORMERS: dict[str, OfTransformers] = {
    "albert": ("AlbertForSequenceClassification", {**_SMALL_TEXT, "embedding_size": 32}, (32,), 500),
    "deit": ("DeiTForImageClassification", {**_SMALL_TEXT, "num_labels": 50}, IMAGE, 0),
    "electra": ("ElectraForSequenceClassification", {**_SMALL_TEXT, "embedding_size": 32}, (32,), 500),
    "gpt_neox": ("GPTNeoXForCausalLM", {**_SMALL_TEXT, "use_cache": False}, (32,), 500),
    "llama": ("LlamaForCausalLM", _GROUPED, (32,), 500),
    "opt": (
        "OPTForCausalLM",
        {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "vocab_size": 500,
            "use_cache": False,
        },
        (32,),
        500,
    ),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED, (32,), 500),
    "roberta": ("RobertaForSequenceClassification", {**_SMALL_TEXT, "max_position_embeddings": 64}, (32,), 500),
}


class Scores(nn.Module):
    """A network of transformers that gives its scores only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        """The scores."""
        return self.network(x).logits


MORE_NETWORKS: dict[str, Network] = {
    **{f"pytorchcv:{name}": of_pytorchcv(name, *found) for name, found in PYTORCHCV.items()},
    **{f"timm:{name}": of_timm(name, shape) for name, shape in TIMM.items()},
    **{f"torchvision:{name}": of_torchvision(name, shape) for name, shape in TORCHVISION.items()},
    **{f"transformers:{name}": of_transformers(found, Scores) for name, found in TRANSFORMERS.items()},
}
