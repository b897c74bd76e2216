"""nnU-Net's own predictor over one CT, in the process of the segmenter `nnunet_folder`.

The networks are built from plans.json as nnUNetTrainer does it, so that the trainer's class, which a model may have
brought along, is not needed.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.districts.nnunet_folder import bad_model, read_json, turned
from pipeline.types import FloatVolume, Grid


def predict(hu: FloatVolume, grid: Grid, settings: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The work of the segmenter's own process: labels [z, y, x] on the CT's grid, certainty per label, hash of weights.

    Mirroring at test time is left off: it is eight times the work, and the districts go onto a grid of some 4 mm.
    """
    with redirect_stdout(StringIO()):  # nnU-Net says at import which folders it misses
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    certainty: dict[str, float] = {}

    class Watched(nnUNetPredictor):
        """Looks at the logits where there are fewest: on the network's own grid."""

        def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
            logits = super().predict_logits_from_preprocessed_data(data)
            certainty.update(mean_softmax(logits))
            return logits

    predictor = Watched(
        use_mirroring=False, device=_device(settings["device"]), allow_tqdm=False, perform_everything_on_device=True
    )
    sha256 = _initialize(predictor, Path(settings["folder"]), [Path(p) for p in settings["checkpoints"]])
    image = turned(hu, settings["orientation"])[None]
    labels = predictor.predict_single_npy_array(image, {"spacing": list(grid.spacing_mm)})
    return {"labels": turned(labels, settings["orientation"])}, {"certainty": certainty, "sha256": sha256}


def mean_softmax(logits: torch.Tensor) -> dict[str, float]:
    """The mean of the winning label's softmax over the voxels that it won, per label; `logits` [label, z, y, x]."""
    count = logits.shape[0]
    hits, sums = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for plane in logits.unbind(1):  # slice by slice: the whole would take as much memory again
        best, label = torch.softmax(plane.float(), 0).max(0)
        hits += torch.bincount(label.ravel(), minlength=count)
        sums += torch.bincount(label.ravel(), best.ravel().double(), minlength=count)
    return {str(k): float(sums[k] / hits[k]) for k in range(count) if hits[k]}


def _initialize(predictor: Any, folder: Path, checkpoints: list[Path]) -> str:
    """Plans, networks and labels into the predictor; the SHA-256 of the checkpoint, or of the folds' digests."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset = read_json(folder / "dataset.json")
    plans = PlansManager(read_json(folder / "plans.json"))
    loaded = [_load(path) for path in checkpoints]
    configuration = plans.get_configuration(loaded[0]["init_args"]["configuration"])
    if configuration.previous_stage_name is not None:
        raise bad_model(folder, "it is the second stage of a cascade, a single stage is expected")
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        determine_num_input_channels(plans, configuration, dataset),
        plans.get_label_manager(dataset).num_segmentation_heads,
        deep_supervision=False,
    )
    weights = [checkpoint["network_weights"] for checkpoint in loaded]
    try:
        network.load_state_dict(weights[0])
    except RuntimeError as error:
        raise bad_model(folder, "its weights do not fit the network of its plans.json") from error
    predictor.manual_initialization(network, plans, configuration, weights, dataset, loaded[0]["trainer_name"], None)
    parts = (folder / "dataset.json", folder / "plans.json", *checkpoints)  # labels and orientation are the first two's
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in parts]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint as nnUNetTrainer writes it; its training log may hold numpy's numbers, else it is tensors."""
    numbers: list[Any] = [np.dtype, *(type(np.dtype(t)) for t in (np.float16, np.float32, np.float64, np.int64))]
    scalar = np.float64(0).__reduce__()[0]
    numbers += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(numbers):
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise bad_model(
            path.parent.parent, f"{path.parent.name}/{path.name} is no checkpoint of tensors and numbers"
        ) from error
    if not {"network_weights", "init_args", "trainer_name"} <= checkpoint.keys():
        raise bad_model(path.parent.parent, f"{path.parent.name}/{path.name} is no checkpoint of nnU-Net v2")
    return checkpoint


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
