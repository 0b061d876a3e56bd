"""Further architectures with random weights, of families that the other two lists lack, in small configurations."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from common.networks import IMAGE, LARGE, SMALL, Network, OfTransformers, of_timm, of_torchvision, of_transformers

HALF = (3, 128, 128)
POSE = (3, 256, 192)
SOUND = (80, 128)

# Of pytorchcv: module, shape of one sample, options. ``in_size`` follows the shape where the network asks for it.
PYTORCHCV: dict[str, tuple[str, tuple[int, ...]]] = {
    "airnext50_32x4d_r2": ("airnext", IMAGE),
    "alphapose_fastseresnet101b_coco": ("alphapose_coco", POSE),
    "bam_resnet18": ("bamresnet", IMAGE),
    "bisenet_resnet18_celebamaskhq": ("bisenet", LARGE),
    "cgnet_cityscapes": ("cgnet", LARGE),
    "channelnet": ("channelnet", IMAGE),
    "condensenet74_c4_g4": ("condensenet", IMAGE),
    "ctxnet_cityscapes": ("contextnet", LARGE),
    "dabnet_cityscapes": ("dabnet", LARGE),
    "danet_resnetd50b_cityscapes": ("danet", LARGE),
    "darts": ("darts", IMAGE),
    "deeplabv3_resnetd50b_voc": ("deeplabv3", LARGE),
    "densenet40_k12_cifar10": ("densenet_cifar", SMALL),
    "diaresnet20_cifar10": ("diaresnet_cifar", SMALL),
    "diapreresnet20_cifar10": ("diapreresnet_cifar", SMALL),
    "dicenet_wd5": ("dicenet", IMAGE),
    "edanet_cityscapes": ("edanet", LARGE),
    "efficientnet_edge_small_b": ("efficientnetedge", IMAGE),
    "enet_cityscapes": ("enet", LARGE),
    "erfnet_cityscapes": ("erfnet", LARGE),
    "esnet_cityscapes": ("esnet", LARGE),
    "espcnet_cityscapes": ("espcnet", LARGE),
    "fastscnn_cityscapes": ("fastscnn", LARGE),
    "fcn8sd_resnetd50b_voc": ("fcn8sd", LARGE),
    "fdmobilenet_w1": ("fdmobilenet", IMAGE),
    "fishnet99": ("fishnet", IMAGE),
    "fpenet_cityscapes": ("fpenet", LARGE),
    "fractalnet_cifar10": ("fractalnet_cifar", SMALL),
    "ibn_resnet50": ("ibnresnet", IMAGE),
    "ibn_densenet121": ("ibndensenet", IMAGE),
    "ibppose_coco": ("ibppose_coco", (3, 256, 256)),
    "icnet_resnetd50b_cityscapes": ("icnet", LARGE),
    "inceptionresnetv1": ("inceptionresnetv1", (3, 299, 299)),
    "inceptionresnetv2": ("inceptionresnetv2", (3, 299, 299)),
    "irevnet301": ("irevnet", IMAGE),
    "isqrtcovresnet18": ("isqrtcovresnet", IMAGE),
    "lednet_cityscapes": ("lednet", LARGE),
    "lffd20x5s320v2_widerface": ("lffd", (3, 320, 320)),
    "linknet_cityscapes": ("linknet", LARGE),
    "lwopenpose2d_mobilenet_cmupan_coco": ("lwopenpose_cmupan", LARGE),
    "mobilenetb_wd2": ("mobilenetb", IMAGE),
    "msdnet22": ("msdnet", IMAGE),
    "ntsnet_cub": ("ntsnet_cub", (3, 448, 448)),
    "prnet": ("prnet", LARGE),
    "pyramidnet110_a48_cifar10": ("pyramidnet_cifar", SMALL),
    "quartznet5x5_en_ls": ("quartznet", (64, 200)),
    "resattnet56": ("resattnet", IMAGE),
    "resdropresnet20_cifar10": ("resdropresnet_cifar", SMALL),
    "resnetd50b": ("resnetd", HALF),
    "revnet38": ("revnet", IMAGE),
    "ror3_56_cifar10": ("ror_cifar", SMALL),
    "scnet50": ("scnet", HALF),
    "sepreresnet18": ("sepreresnet", IMAGE),
    "shakeshakeresnet20_2x16d_cifar10": ("shakeshakeresnet_cifar", SMALL),
    "sharesnet18": ("sharesnet", IMAGE),
    "shufflenetv2b_w1": ("shufflenetv2b", IMAGE),
    "simplepose_mobile_resnet18_coco": ("simpleposemobile_coco", POSE),
    "sinet_cityscapes": ("sinet", LARGE),
    "sparsenet121": ("sparsenet", IMAGE),
    "sqnet_cityscapes": ("sqnet", LARGE),
    "sqnxt23_w1": ("squeezenext", IMAGE),
    "squeezeresnet_v1_1": ("squeezenet", IMAGE),
    "superpointnet": ("superpointnet", (1, 64, 64)),
    "tresnet_m": ("tresnet", IMAGE),
    "xdensenet40_2_k24_bc_cifar10": ("xdensenet_cifar", SMALL),
    "zfnet": ("zfnet", IMAGE),
}

# Of timm: shape of one sample.
TIMM = {
    "bat_resnext26ts": LARGE,
    "botnet26t_256": LARGE,
    "caformer_s18": IMAGE,
    "coatnext_nano_rw_224": IMAGE,
    "convit_tiny": IMAGE,
    "convnextv2_atto": HALF,
    "cs3darknet_focus_s": HALF,
    "deit_tiny_distilled_patch16_224": IMAGE,
    "dla46x_c": HALF,
    "dm_nfnet_f0": (3, 192, 192),
    "dpn48b": HALF,
    "eca_nfnet_l0": HALF,
    "eca_resnet33ts": LARGE,
    "efficientformerv2_s0": IMAGE,
    "efficientnetv2_rw_t": HALF,
    "efficientvim_m1": IMAGE,
    "efficientvit_m0": IMAGE,
    "fasternet_t0": HALF,
    "flexivit_small": (3, 240, 240),
    "focalnet_tiny_srf": IMAGE,
    "gcvit_xxtiny": IMAGE,
    "gernet_s": LARGE,
    "ghostnetv2_100": HALF,
    "gmixer_12_224": IMAGE,
    "halonet26t": LARGE,
    "hgnetv2_b0": HALF,
    "hiera_tiny_224": IMAGE,
    "hrnet_w18_small": HALF,
    "inception_next_atto": HALF,
    "lambda_resnet26t": LARGE,
    "lcnet_050": HALF,
    "mambaout_femto": HALF,
    "maxvit_rmlp_pico_rw_256": LARGE,
    "mobilevit_xxs": LARGE,
    "mvitv2_tiny": IMAGE,
    "nest_tiny": IMAGE,
    "nextvit_small": HALF,
    "poolformerv2_s12": HALF,
    "rdnet_tiny": HALF,
    "regnetz_b16": HALF,
    "repghostnet_050": HALF,
    "repvit_m0_9": HALF,
    "res2next50": HALF,
    "resmlp_12_224": IMAGE,
    "resnetblur50": HALF,
    "sebotnet33ts_256": LARGE,
    "selecsls42": HALF,
    "sequencer2d_s": IMAGE,
    "shvit_s1": IMAGE,
    "starnet_s1": HALF,
    "swiftformer_xs": IMAGE,
    "swinv2_tiny_window8_256": LARGE,
    "tiny_vit_5m_224": IMAGE,
    "tinynet_e": HALF,
    "twins_svt_small": IMAGE,
    "vgg11_bn": HALF,
    "visformer_tiny": IMAGE,
    "vit_relpos_small_patch16_224": IMAGE,
    "vitamin_small_224": IMAGE,
    "xception41p": HALF,
}
TORCHVISION = {
    "efficientnet_v2_s": HALF,
    "googlenet": IMAGE,
    "mnasnet0_5": HALF,
    "regnet_y_400mf": HALF,
    "squeezenet1_0": HALF,
}
# GoogLeNet of torchvision has outputs for training besides, which are left out.
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"aux_logits": False, "init_weights": False}}

_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_WORDS = {**_TEXT, "vocab_size": 500}
_CLIP = {**_TEXT, "projection_dim": 64}
_DECODER = {**_WORDS, "num_key_value_heads": 2, "use_cache": False}
_WAVE = {**_WORDS, "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}
_WAVE |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}

# Of transformers: model class, its options, shape of one sample, vocabulary (0: the input is an image or a sound).
TRANSFORMERS: dict[str, OfTransformers] = {
    "bart_encoder": (
        "BartEncoder",
        {"vocab_size": 500, "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128},
        (32,),
        500,
    ),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 500, "use_cache": False},
        (32,),
        500,
    ),
    "clip_text": ("CLIPTextModel", {**_CLIP, "vocab_size": 500, "eos_token_id": 499}, (32,), 500),
    "clip_vision": ("CLIPVisionModel", {**_CLIP, "image_size": 64, "patch_size": 16}, (3, 64, 64), 0),
    "convbert": ("ConvBertForSequenceClassification", {**_WORDS, "embedding_size": 64}, (32,), 500),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]},
        HALF,
        0,
    ),
    "cvt": ("CvtForImageClassification", {"depth": [1, 2, 3]}, HALF, 0),
    "deberta_v2": ("DebertaV2ForSequenceClassification", {**_WORDS, "relative_attention": True}, (32,), 500),
    "dinov2": ("Dinov2ForImageClassification", {**_TEXT, "image_size": 56, "patch_size": 14}, (3, 56, 56), 0),
    "dpt": (
        "DPTForDepthEstimation",
        {**_TEXT, "num_hidden_layers": 12, "image_size": 64, "backbone_out_indices": [2, 5, 8, 11]},
        (3, 64, 64),
        0,
    ),
    "efficientnet": ("EfficientNetForImageClassification", {"width_coefficient": 0.5, "hidden_dim": 640}, HALF, 0),
    "fnet": ("FNetForSequenceClassification", {**_WORDS}, (32,), 500),
    "focalnet": (
        "FocalNetForImageClassification",
        {"embed_dim": 32, "depths": [1, 1, 2, 1], "image_size": 64},
        (3, 64, 64),
        0,
    ),
    "gemma": ("GemmaForCausalLM", {**_DECODER, "head_dim": 16}, (32,), 500),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 500,
            "use_cache": False,
        },
        (32,),
        500,
    ),
    "gptj": (
        "GPTJForCausalLM",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 500, "use_cache": False},
        (32,),
        500,
    ),
    "hubert": ("HubertModel", {**_WAVE}, (4000,), 0),
    "layoutlm": ("LayoutLMForSequenceClassification", {**_WORDS}, (32,), 500),
    "levit": (
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        (3, 64, 64),
        0,
    ),
    "mistral": ("MistralForCausalLM", {**_DECODER}, (32,), 500),
    "mobilebert": ("MobileBertForSequenceClassification", {"num_hidden_layers": 2, "vocab_size": 500}, (32,), 500),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", {"depth_multiplier": 0.5}, HALF, 0),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.5}, HALF, 0),
    "mobilevit": ("MobileViTForImageClassification", {}, LARGE, 0),
    "mobilevitv2": ("MobileViTV2ForImageClassification", {"width_multiplier": 0.5}, LARGE, 0),
    "mpnet": ("MPNetForSequenceClassification", {**_WORDS}, (32,), 500),
    "mpt": (
        "MptForCausalLM",
        {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 500, "max_seq_len": 64, "use_cache": False},
        (32,),
        500,
    ),
    "nystromformer": (
        "NystromformerForSequenceClassification",
        {**_WORDS, "segment_means_seq_len": 32, "num_landmarks": 8},
        (32,),
        500,
    ),
    "olmo": ("OlmoForCausalLM", {**_DECODER}, (32,), 500),
    "phi": ("PhiForCausalLM", {**_WORDS, "use_cache": False}, (32,), 500),
    "phi3": ("Phi3ForCausalLM", {**_DECODER, "pad_token_id": 0}, (32,), 500),
    "poolformer": (
        "PoolFormerForImageClassification",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
        HALF,
        0,
    ),
    "pvt": (
        "PvtForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
        },
        (3, 64, 64),
        0,
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}, (32,), 500),
    "regnet": (
        "RegNetForImageClassification",
        {"hidden_sizes": [32, 64, 96, 128], "groups_width": 16, "depths": [1, 1, 2, 1]},
        HALF,
        0,
    ),
    "rembert": ("RemBertForSequenceClassification", {**_WORDS, "input_embedding_size": 32}, (32,), 500),
    "resnet": (
        "ResNetForImageClassification",
        {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"},
        HALF,
        0,
    ),
    "siglip_vision": ("SiglipVisionModel", {**_TEXT, "image_size": 64, "patch_size": 16}, (3, 64, 64), 0),
    "squeezebert": ("SqueezeBertForSequenceClassification", {**_WORDS, "embedding_size": 64}, (32,), 500),
    "swiftformer": (
        "SwiftFormerForImageClassification",
        {"embed_dims": [24, 32, 48, 64], "depths": [1, 1, 1, 1]},
        HALF,
        0,
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        (3, 64, 64),
        0,
    ),
    "t5_encoder": (
        "T5EncoderModel",
        {"vocab_size": 500, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        (32,),
        500,
    ),
    "vit_msn": ("ViTMSNForImageClassification", {**_TEXT, "image_size": 64}, (3, 64, 64), 0),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", {**_WAVE, "classifier_proj_size": 32}, (4000,), 0),
    "whisper_encoder": (
        "WhisperEncoder",
        {
            "encoder_layers": 2,
            "d_model": 64,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "max_source_positions": 64,
        },
        SOUND,
        0,
    ),
    "xlm_roberta": ("XLMRobertaForSequenceClassification", {**_WORDS, "max_position_embeddings": 64}, (32,), 500),
    "yolos": (
        "YolosForObjectDetection",
        {**_TEXT, "image_size": [64, 64], "num_detection_tokens": 10, "use_mid_position_embeddings": False},
        (3, 64, 64),
        0,
    ),
}


class MainOutput(nn.Module):
    """A network that gives the tensor that matters of its outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        """Scores, else the last hidden state, else the first output."""
        found = self.network(x)
        for name in ("logits", "last_hidden_state"):
            if getattr(found, name, None) is not None:
                return getattr(found, name)
        return found[0]


class Sound(nn.Module):
    """A network that also takes how long each sound is, called with whole sounds."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        """What the network gives for the sounds."""
        lengths = torch.full((x.shape[0],), x.shape[2], dtype=torch.long)
        return self.network(x, lengths)[0]


def pytorchcv(name: str, module: str, shape: tuple[int, ...]) -> Network:
    def make() -> nn.Module:
        build: Callable[..., nn.Module] = getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)
        sized = module in ("bisenet", "sinet", "icnet", "danet", "deeplabv3", "fcn8sd") or "cityscapes" in name
        if module == "quartznet":
            return Sound(build(from_audio=False))
        return build(in_size=shape[1:]) if sized else build()

    return Network(make, shape)


FURTHER_NETWORKS: dict[str, Network] = {
    **{f"pytorchcv:{name}": pytorchcv(name, *found) for name, found in PYTORCHCV.items()},
    **{f"timm:{name}": of_timm(name, shape) for name, shape in TIMM.items()},
    **{
        f"torchvision:{name}": of_torchvision(name, shape, **OPTIONS.get(name, {}))
        for name, shape in TORCHVISION.items()
    },
    **{f"transformers:{name}": of_transformers(found, MainOutput) for name, found in TRANSFORMERS.items()},
}
