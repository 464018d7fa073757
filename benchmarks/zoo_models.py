"""The models of the zoo benchmark: how to build each one, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zoo_transformers import MODELS as TRANSFORMERS
from zoo_transformers import build_transformer, double_transformer

__all__ = ["ZOOS", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        build: Gives the model, with random weights.
        inputs: Batch size -> what it takes in evaluation mode: a tensor, a tuple (positional) or a dict (keyword).
        train_inputs: The same in training mode (None: ``inputs``).
        dynamic: Sizes of outputs and cost depend on values, as in detection.
        parts: Modules whose outputs are compared too, because the final ones are chosen from them.
        double: Converts the model to double precision, in place.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    train_inputs: Callable[[int], Any] | None = None
    dynamic: bool = False
    parts: tuple[str, ...] = ()
    double: Callable[[nn.Module], nn.Module] = nn.Module.double


def one_tensor(size: tuple[int, ...], batch: int) -> Tensor:
    return torch.rand(batch, *size)


def two_tensors(size: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, *size), torch.rand(batch, *size)


# ---------------------------------------------------------------------------------------------------------- torchvision

_RCNN = {
    "min_size": 224,
    "max_size": 224,
    "rpn_post_nms_top_n_test": 50,
    "rpn_post_nms_top_n_train": 50,
    "box_score_thresh": 0.0,  # or random weights find nothing
    "box_detections_per_img": 10,
}
_DENSE_DETECTOR = {"score_thresh": 0.0, "topk_candidates": 50, "detections_per_img": 10}
_RCNN_PARTS = ("rpn.head", "roi_heads.box_predictor")
_DETECTORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "faster_rcnn": (_RCNN, _RCNN_PARTS),
    "mask_rcnn": (_RCNN, (*_RCNN_PARTS, "roi_heads.mask_predictor")),
    "keypoint_rcnn": (_RCNN, (*_RCNN_PARTS, "roi_heads.keypoint_predictor")),
    "retinanet": ({"min_size": 224, "max_size": 224, **_DENSE_DETECTOR}, ("head",)),
    "fcos": ({"min_size": 224, "max_size": 224, **_DENSE_DETECTOR}, ("head",)),
    "ssd": (_DENSE_DETECTOR, ("head",)),
    "ssdlite": (_DENSE_DETECTOR, ("head",)),
}
_CLIPS = {"s3d": (3, 16, 224, 224), "mvit": (3, 16, 224, 224), "swin_transformer": (3, 16, 112, 112)}


def detection_inputs(batch: int) -> tuple[list[Tensor]]:
    return ([torch.rand(3, 224, 224) for _ in range(batch)],)


def detection_targets(batch: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with two objects each, annotated for every kind of detector."""
    target = {
        "boxes": torch.tensor([[20.0, 20.0, 120.0, 140.0], [60.0, 40.0, 200.0, 200.0]]),
        "labels": torch.tensor([1, 1]),
        "masks": torch.ones(2, 224, 224, dtype=torch.uint8),
        "keypoints": torch.full((2, 17, 3), 100.0),
    }
    return (*detection_inputs(batch), [dict(target) for _ in range(batch)])


def double_raft(model: nn.Module) -> nn.Module:
    """RAFT makes coordinates in single precision whatever it is itself."""
    from torchvision.models.optical_flow import raft

    make = raft.make_coords_grid
    raft.make_coords_grid = lambda *args, **kwargs: make(*args, **kwargs).double()
    return model.double()


def torchvision_entry(name: str) -> Entry:
    from torchvision import models

    family, module = models.get_model_builder(name).__module__.split(".")[-2:]
    build = partial(models.get_model, name, weights=None)
    if family == "detection":
        options, parts = _DETECTORS[module]
        return Entry(partial(build, weights_backbone=None, **options), detection_inputs, detection_targets, True, parts)
    if family == "segmentation":
        return Entry(partial(build, weights_backbone=None), partial(one_tensor, (3, 224, 224)))
    if family == "video":
        return Entry(build, partial(one_tensor, _CLIPS.get(module, (3, 16, 112, 112))))
    if family == "optical_flow":
        return Entry(build, partial(two_tensors, (3, 128, 128)), double=double_raft)
    if name in {"googlenet", "inception_v3"}:
        build = partial(build, init_weights=False)  # the old initialization takes minutes
    size = 299 if name == "inception_v3" else 224
    return Entry(build, partial(one_tensor, (3, size, size)))


def torchvision_zoo() -> dict[str, Entry]:
    """All float models of torchvision."""
    from torchvision import models

    names = [name for name in models.list_models() if not name.startswith("quantized_")]
    return {name: torchvision_entry(name) for name in names}


# ----------------------------------------------------------------------------------------------------------------- timm

_TIMM = """
beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny coat_tiny coatnet_0_rw_224 convit_tiny
convmixer_768_32 convnext_atto convnextv2_atto cpubone_nano crossvit_9_240 cs3darknet_s csatv2 cspnext_tiny
cspresnet50 davit_tiny deit3_small_patch16_224 deit_tiny_distilled_patch16_224 densenet121 dla46_c dla46x_c dpn48b
eca_halonext26ts edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_es
efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
fbnetc_100 flexivit_small focalnet_tiny_srf gcvit_xxtiny gernet_s ghostnet_050 ghostnetv2_100 ghostnetv3_050
gmixer_12_224 gmlp_ti16_224 hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small
iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_050 lcnetv2_small
legacy_seresnet18 legacy_seresnext26_32x4d legacy_xception levit_128s levit_conv_128s lowformer_b0 mambaout_femto
maxvit_pico_rw_256 mixer_s16_224 mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050
mobilenetv4_conv_small mobilenetv4_hybrid_medium mobilenetv5_base mobileone_s0 mobilevit_xxs mobilevitv2_050
mvitv2_tiny nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nf_resnet26 nfnet_l0 pit_ti_224 pnasnet5large
poolformer_s12 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvgg_a0
repvit_m0_9 res2net50_14w_8s res2next50 resmlp_12_224 resnest14d resnet10t resnet26t resnetv2_50 resnext50_32x4d
rexnet_100 samvit_base_patch16_224 selecsls42 semnasnet_075 sequencer2d_s shvit_s1 skresnet18 spnasnet_100
starnet_s050 swiftformer_xs swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
tf_efficientnetv2_b0 tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11
vgg11_bn visformer_tiny vit_relpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224
volo_d1_224 xception41 xcit_nano_12_p8_224
"""  # a small member of each family
_TIMM_LARGE = {  # where the smallest is large: options that make it smaller
    "deepseek_vit_412m": {"img_size": 112, "depth": 4},
    "gemma4_vit_167m": {"img_size": 192, "depth": 4},
    "naflexvit_base_patch16_gap": {"img_size": 224, "depth": 4},
    "qwen3_vit_88m": {"img_size": 192, "depth": 4},
}


def timm_entry(name: str, options: dict[str, Any]) -> Entry:
    import timm

    size = timm.get_pretrained_cfg(name).input_size
    if "img_size" in options:
        size = (3, options["img_size"], options["img_size"])
    return Entry(partial(timm.create_model, name, pretrained=False, **options), partial(one_tensor, size))


def timm_zoo() -> dict[str, Entry]:
    """A small model of each family of timm."""
    models: dict[str, dict[str, Any]] = {name: {} for name in _TIMM.split()} | _TIMM_LARGE
    return {name: timm_entry(name, options) for name, options in sorted(models.items())}


# --------------------------------------------------------------------------------------------------------- transformers


def transformers_zoo() -> dict[str, Entry]:
    """Models of Hugging Face transformers, built from small configurations."""
    return {
        name: Entry(partial(build_transformer, model), model.inputs, double=double_transformer)
        for name, model in TRANSFORMERS.items()
    }


# -------------------------------------------------------------------------------------------------------------- scaling


class Residual(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


def residual_net(width: int, depth: int) -> nn.Module:
    blocks = [Residual(width) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, width, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def vision_transformer(depth: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, depth, num_heads=4, hidden_dim=256, mlp_dim=1024, num_classes=10)


def scaling_zoo() -> dict[str, Entry]:
    """Three families of 1, 10 and 100 million parameters."""
    families: dict[str, dict[str, Callable[[], nn.Module]]] = {
        "deep_residual": {f"{m}M": partial(residual_net, 64, d) for m, d in ((1, 14), (10, 136), (100, 1357))},
        "wide_residual": {f"{m}M": partial(residual_net, w, 8) for m, w in ((1, 83), (10, 264), (100, 833))},
        "deep_transformer": {f"{m}M": partial(vision_transformer, d) for m, d in ((1, 1), (10, 13), (100, 127))},
    }
    inputs = partial(one_tensor, (3, 32, 32))
    return {
        f"{family}_{size}": Entry(build, inputs) for family, sizes in families.items() for size, build in sizes.items()
    }


ZOOS: dict[str, Callable[[], dict[str, Entry]]] = {
    "torchvision": torchvision_zoo,
    "timm": timm_zoo,
    "transformers": transformers_zoo,
    "scaling": scaling_zoo,
}
