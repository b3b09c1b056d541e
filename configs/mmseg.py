"""Recipes of mmsegmentation: PSPNet, FCN, DeepLabV3 and EncNet on four data sets, with the numbers published there.

Variants are NETWORK_rDEPTH_DATA_STEPS as in `PUBLISHED`, pspnet_r50_ade20k_80k by default. Data `cityscapes` has crops
of 512 x 1024, `cityscapes769` of 769 x 769; `pcontext` is PASCAL Context with 59 classes. Each starts from the ImageNet
weights that mmsegmentation starts from, and `eval` sets the protocol of its test.

What differs here: the loss is the mean over labelled pixels, there over all pixels of the crop, void ones adding
nothing; padding is on both sides, not at the bottom and right; new layers start as PyTorch's default has it, not from
normal distributions; convolutions are in bfloat16.
"""

from difflib import get_close_matches
from typing import Any

from ml_collections import ConfigDict

from psp_jax.config import defaults

IMAGENET = "https://download.openmmlab.com/pretrain/third_party/"
FILES = {50: "resnet50_v1c-2cccc1ad.pth", 101: "resnet101_v1c-e67eebb6.pth"}
NETWORKS: dict[str, dict[str, Any]] = {
    "pspnet": {"model.head": "psp"},
    "fcn": {"model.head": "fcn", "model.fcn_convs": 2, "model.fcn_concat": True},
    "deeplabv3": {"model.head": "aspp"},
    "encnet": {"model.head": "enc", "train.se_weight": 0.2},
}
DATA: dict[str, dict[str, Any]] = {
    "ade20k": {
        "data.name": "ade20k",
        "augment.base_size": (2048, 512),
        "train.crop_size": (512,),
        "eval.base_size": (2048, 512),
    },
    "voc2012": {
        "data.name": "voc2012",
        "data.train_split": "train_aug",
        "augment.base_size": (2048, 512),
        "train.crop_size": (512,),
        "eval.base_size": (2048, 512),
    },
    "cityscapes": {
        "data.name": "cityscapes",
        "augment.base_size": (2048, 1024),
        "train.crop_size": (512, 1024),
        "train.batch_size": 8,
        "eval.base_size": (2048, 1024),
        "eval.batch_size": 8,
    },
    "cityscapes769": {
        "data.name": "cityscapes",
        "augment.base_size": (2049, 1025),
        "model.align_corners": True,
        "train.crop_size": (769,),
        "train.batch_size": 8,
        "eval.base_size": (2049, 1025),
        "eval.size": (513, 1025),
        "eval.window": (769,),
        "eval.stride": (513,),
        "eval.batch_size": 8,
    },
    "pcontext": {
        "data.name": "pascal_context",
        "augment.base_size": (520, 520),
        "train.crop_size": (480,),
        "optimizer.base_lr": 0.004,
        "optimizer.weight_decay": 1e-4,
        "eval.base_size": (520, 520),
        "eval.window": (480,),
        "eval.stride": (320,),
    },
}
# Mean IoU on the validation split: at one scale without mirror images, and at six scales with them.
PUBLISHED = {
    "pspnet_r50_ade20k_80k": (41.13, 41.94),
    "pspnet_r101_ade20k_80k": (43.57, 44.35),
    "pspnet_r50_ade20k_160k": (42.48, 43.44),
    "pspnet_r101_ade20k_160k": (44.39, 45.35),
    "pspnet_r50_voc2012_20k": (76.78, 77.61),
    "pspnet_r101_voc2012_20k": (78.47, 79.25),
    "pspnet_r50_voc2012_40k": (77.29, 78.48),
    "pspnet_r101_voc2012_40k": (78.52, 79.57),
    "pspnet_r50_cityscapes_40k": (77.85, 79.18),
    "pspnet_r101_cityscapes_40k": (78.34, 79.74),
    "pspnet_r50_cityscapes_80k": (78.55, 79.79),
    "pspnet_r101_cityscapes_80k": (79.76, 81.01),
    "pspnet_r50_cityscapes769_40k": (78.26, 79.88),
    "pspnet_r101_cityscapes769_40k": (79.08, 80.28),
    "pspnet_r50_cityscapes769_80k": (79.59, 80.69),
    "pspnet_r101_cityscapes769_80k": (79.77, 81.06),
    "pspnet_r101_pcontext_40k": (52.02, 53.54),
    "pspnet_r101_pcontext_80k": (52.47, 53.99),
    "fcn_r50_ade20k_80k": (35.94, 37.94),
    "fcn_r101_ade20k_80k": (39.61, 40.83),
    "fcn_r50_ade20k_160k": (36.10, 38.08),
    "fcn_r101_ade20k_160k": (39.91, 41.40),
    "fcn_r50_voc2012_20k": (67.08, 69.94),
    "fcn_r101_voc2012_20k": (71.16, 73.57),
    "fcn_r50_voc2012_40k": (66.97, 69.04),
    "fcn_r101_voc2012_40k": (69.91, 72.38),
    "fcn_r50_cityscapes_40k": (72.25, 73.36),
    "fcn_r101_cityscapes_40k": (75.45, 76.58),
    "fcn_r50_cityscapes_80k": (73.61, 74.24),
    "fcn_r101_cityscapes_80k": (75.13, 75.94),
    "fcn_r50_cityscapes769_40k": (71.47, 72.54),
    "fcn_r101_cityscapes769_40k": (73.93, 75.14),
    "fcn_r50_cityscapes769_80k": (72.64, 73.32),
    "fcn_r101_cityscapes769_80k": (75.52, 76.61),
    "fcn_r101_pcontext_40k": (48.42, 50.4),
    "fcn_r101_pcontext_80k": (49.35, 51.38),
    "deeplabv3_r50_ade20k_80k": (42.42, 43.28),
    "deeplabv3_r101_ade20k_80k": (44.08, 45.19),
    "deeplabv3_r50_ade20k_160k": (42.66, 44.09),
    "deeplabv3_r101_ade20k_160k": (45.00, 46.66),
    "deeplabv3_r50_voc2012_20k": (76.17, 77.42),
    "deeplabv3_r101_voc2012_20k": (78.70, 79.95),
    "deeplabv3_r50_voc2012_40k": (77.68, 78.78),
    "deeplabv3_r101_voc2012_40k": (77.92, 79.18),
    "deeplabv3_r50_cityscapes_40k": (79.09, 80.45),
    "deeplabv3_r101_cityscapes_40k": (77.12, 79.61),
    "deeplabv3_r50_cityscapes_80k": (79.32, 80.57),
    "deeplabv3_r101_cityscapes_80k": (80.20, 81.21),
    "deeplabv3_r50_cityscapes769_40k": (78.58, 79.89),
    "deeplabv3_r101_cityscapes769_40k": (79.27, 80.11),
    "deeplabv3_r50_cityscapes769_80k": (79.89, 81.06),
    "deeplabv3_r101_cityscapes769_80k": (79.67, 80.81),
    "deeplabv3_r101_pcontext_40k": (52.61, 54.28),
    "deeplabv3_r101_pcontext_80k": (52.46, 54.09),
    "encnet_r50_ade20k_80k": (39.53, 41.17),
    "encnet_r101_ade20k_80k": (42.11, 43.61),
    "encnet_r50_ade20k_160k": (40.10, 41.71),
    "encnet_r101_ade20k_160k": (42.61, 44.01),
    "encnet_r50_cityscapes_40k": (75.67, 77.08),
    "encnet_r101_cityscapes_40k": (75.81, 77.21),
    "encnet_r50_cityscapes_80k": (77.94, 79.13),
    "encnet_r101_cityscapes_80k": (78.55, 79.47),
    "encnet_r50_cityscapes769_40k": (76.24, 77.85),
    "encnet_r101_cityscapes769_40k": (74.25, 76.25),
    "encnet_r50_cityscapes769_80k": (77.44, 78.72),
    "encnet_r101_cityscapes769_80k": (76.10, 76.97),
}
VARIANTS = tuple(PUBLISHED)
EXPECTED: dict[str, dict[str, Any]] = {
    variant: {
        "mean_iou_single": single,
        "mean_iou_multi": multi,
        "source": f"open-mmlab/mmsegmentation, configs/{variant.partition('_')[0]}",
    }
    for variant, (single, multi) in PUBLISHED.items()
}


def get_config(variant: str = "pspnet_r50_ade20k_80k") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in VARIANTS:
        near = get_close_matches(variant, VARIANTS) or VARIANTS[:1]
        raise ValueError(
            f"configs/mmseg.py has no variant {variant!r}; PUBLISHED in it lists them, for example {', '.join(near)}."
        )
    network, depth, data, thousands = variant.split("_")
    steps = 1000 * int(thousands.removesuffix("k"))
    config = defaults()
    config.data.num_workers = 8
    config.augment.update(rotate_probability=0.0, blur_probability=0.0, max_class_share=0.75, photometric=True)
    config.model.update(depth=int(depth[1:]), stem="32-32-64", first_block_dilation="contracted", align_corners=False)
    config.model.dtype = "bfloat16"
    config.init.update(source="mmseg", path=IMAGENET + FILES[config.model.depth])
    config.train.steps = steps
    config.optimizer.update(weight_decay=5e-4, end_lr=1e-4, head_lr_multiplier=1.0)
    config.eval.update(every_steps=steps // 10, protocol="mmseg")
    config.update_from_flattened_dict(NETWORKS[network] | DATA[data])
    return config
