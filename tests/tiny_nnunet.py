"""A real nnU-Net v2 model folder, tiny, whose labels are known: its weights are set by hand to tell HU apart.

The network is nnU-Net's PlainConvUNet; its first convolution looks at one voxel of a 3x3x3 neighborhood (`tap`), and
the last layer gives every voxel the label whose HU is the nearest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

MOOSE_LABELS = {"background": 0, "legs": 1, "body": 2, "head": 3, "arms": 4}
LABEL_HU = (-1000.0, -150.0, 0.0, 230.0, 120.0)  # of the labels 0 to 4
LOWEST_HU, STEEPNESS = -1024.0, 2000.0
CENTER = (1, 1, 1)

ARCHITECTURE: dict[str, Any] = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2,
        "features_per_stage": [1, 1],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3], [1, 1, 1]],
        "strides": [[1, 1, 1], [1, 1, 1]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": None,
        "norm_op_kwargs": None,
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.ReLU",
        "nonlin_kwargs": {},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


def plans(spacing_mm: tuple[float, float, float], reader: str) -> dict[str, Any]:
    """plans.json of one configuration, "3d_fullres", as nnU-Net's planner writes it."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "median_image_size_in_voxels": [40, 40, 40],
        "spacing": list(spacing_mm),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": ARCHITECTURE,
        "batch_dice": False,
    }
    intensity = {"mean": LOWEST_HU, "std": 1000.0, "percentile_00_5": LOWEST_HU, "percentile_99_5": 3000.0}
    return {
        "dataset_name": "Dataset001_body",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(spacing_mm),
        "original_median_shape_after_transp": [40, 40, 40],
        "image_reader_writer": reader,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensity},
    }


def weights(network: torch.nn.Module, tap: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Weights by which the network gives the voxel at `tap` (z, y, x) the label of the nearest of `LABEL_HU`."""
    state = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    at = (np.array(LABEL_HU) - LOWEST_HU) / 1000.0
    lines = torch.tensor(STEEPNESS * (at - at[2])), torch.tensor(STEEPNESS * (at[2] ** 2 - at**2) / 2)
    for key, value in state.items():  # the encoder is listed twice: by itself and as the decoder's
        if "encoder.stages.0" in key and key.endswith("weight"):
            value[(0, 0, *tap)] = 1.0
        elif "decoder.stages.0" in key and key.endswith("weight"):
            value[(0, 1, *CENTER)] = 1.0  # the skip connection; what comes from below is 0
        elif "seg_layers" in key:
            line = lines[0 if key.endswith("weight") else 1]
            value.copy_(line.reshape(value.shape))
    return state


def write_model(
    folder: Path,
    *,
    spacing_mm: tuple[float, float, float],
    labels: Mapping[str, Any] | None = None,
    reader: str = "SimpleITKIO",
    tap: tuple[int, int, int] = CENTER,
) -> Path:
    """A model folder in `folder`, as `unzip` leaves MOOSE's; returns the trainer's folder in it."""
    planned = plans(spacing_mm, reader)
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": dict(labels or MOOSE_LABELS),
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    model = folder / "Dataset001_body" / "nnUNetTrainer_2000epochs_NoMirroring__nnUNetPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(planned), encoding="utf-8")
    (model / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    configuration = PlansManager(planned).get_configuration("3d_fullres")
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        len(LABEL_HU),
        deep_supervision=False,
    )
    checkpoint = {  # the keys of nnUNetTrainer.save_checkpoint
        "network_weights": weights(network, tap),
        "optimizer_state": torch.optim.SGD(network.parameters(), 0.01, momentum=0.99).state_dict(),
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.9)], "train_losses": [np.float32(-0.5)], "lrs": [0.01]},
        "_best_ema": np.float64(0.9),
        "current_epoch": 1000,
        "init_args": {
            "plans": planned,
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": dataset,
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer_2000epochs_NoMirroring",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    return model
