"""Cutting training patches out of prepared studies and augmenting them, in batches and on the training's device.

Everything random about a sample follows from that sample's own entropy, a tuple of integers. So a batch may be
drawn by one process or shared out among several, in any order, and the samples are the same.

    entropy -> where, which way up, how turned   (numpy, on the host, a few numbers per sample)
    cut     -> cubes of CT, PET and labels        (from the mapped files, or from buffers on the GPU)
    turn    -> the window inside the cube         (torch, the whole batch at once)
    mask    -> input channels, target, weights    (torch, the whole batch at once)
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from numpy.typing import NDArray
from torch import Tensor

from pipeline.bundle import INPUT_CHANNELS
from pipeline.types import WHOLE_BODY, District
from training.patches.volumes import LESION, Placement, Triple, volumes_on
from training.prepared import PreparedStudy
from training.recipe import AugmentRecipe, TrainRecipe

JITTER = 0.375  # of the window: how far from the patch's centre the chosen voxel may lie, as windows at inference do
MAX_CHOICES = 50_000  # voxels per study that patches are aimed at, see `_choices`


@dataclass(frozen=True, slots=True)
class Batch:
    """float32 on the device: `input` (N, c, w, w, w), `pet` and `weight` (N, 1, w, w, w), axes [z, y, x].

    `input` has the channels of `pipeline.bundle.INPUT_CHANNELS`. `pet` is in [0, 1] and 0 outside the body.
    `weight` is the L1 weight: 1 in the district, less beside it, more in lesions, 0 outside the body.
    """

    input: Tensor
    pet: Tensor
    weight: Tensor

    @property
    def body(self) -> Tensor:
        """1 where the loss looks, 0 elsewhere."""
        return (self.weight > 0).to(self.weight.dtype)

    def __len__(self) -> int:
        return self.input.shape[0]


class PatchSampler:
    """Draws patches whose chosen voxel lies in one district (or anywhere in the body for the whole-body network).

    Studies are drawn with equal chances, whatever their size. A lesion is aimed at with the probability
    `train.lesion_share` where the study has one in the district. Augmentation is the paper's (section IV-A):
    rotation about each of the three axes, flips along each of them with probability 1/2, Gaussian noise on the CT.

    Args:
        studies: prepared studies; those without the district are left out.
        key: a district's key or "whole_body".
        window: side of a patch in voxels.
        input_mask: what the network sees of the CT, see `pipeline.bundle.Manifest`.
        train: neighbor_weight, lesion_weight and lesion_share are read.
        augment: zeros and False leave the patches as they are.
        device: where the batches are wanted.

    Raises:
        ValueError: no study shows the district, or the input mask is unknown.
    """

    def __init__(
        self,
        studies: Sequence[PreparedStudy],
        key: str,
        *,
        window: int,
        input_mask: str,
        train: TrainRecipe,
        augment: AugmentRecipe,
        device: torch.device,
    ) -> None:
        if input_mask not in INPUT_CHANNELS:
            raise ValueError(f"input mask {input_mask!r} is not one of {sorted(INPUT_CHANNELS)}")
        self._label = None if key == WHOLE_BODY else District[key.upper()]
        self._window, self._input_mask, self._device = window, input_mask, device
        self._augment, self._lesion_share = augment, train.lesion_share
        choices = [(study, *_choices(study, self._label)) for study in studies]
        kept = [choice for choice in choices if choice[1].size]
        if not kept:
            raise ValueError(f"no training study has any voxel of {key}")
        self._studies = [study for study, _, _ in kept]
        self._voxels, self._lesions = [voxels for _, voxels, _ in kept], [lesions for _, _, lesions in kept]
        self._sides = cube_sides(window, augment.rotation_deg, [study.record.spacing_mm for study in self._studies])
        self._volumes = volumes_on(self._studies, device)
        self._tables = {name: table.to(device) for name, table in _tables(self._label, train, input_mask).items()}
        self._generator = torch.Generator(device=device)

    def __len__(self) -> int:
        """The number of studies that have the district."""
        return len(self._studies)

    def draw(self, entropy: Sequence[tuple[int, ...]]) -> Batch:
        """One patch per tuple; the same tuple gives the same patch on the same kind of device."""
        places = [self.place(words) for words in entropy]
        images, labels = self._volumes.cut(places, self._sides, self._window)
        images = images.to(self._device, non_blocking=True).float()  # uploaded as halves, where they are not there yet
        labels = labels.to(self._device, non_blocking=True)
        if self._augment.rotation_deg:
            images, labels = turn(images, labels, np.stack([place.matrix for place in places]), self._window)
        ct, pet = images[:, :1], images[:, 1:]
        if self._augment.ct_noise:
            ct = self._with_noise(ct, places)
        shape, index = labels.shape, labels.flatten().int()
        looked_up = {name: table.index_select(0, index).view(shape) for name, table in self._tables.items()}
        return Batch(self._channels(ct, looked_up), pet * looked_up["body"], looked_up["weight"])

    def place(self, entropy: tuple[int, ...]) -> Placement:
        """Where the sample lies and how it is augmented. The order of the draws is part of what a run repeats."""
        rng = np.random.default_rng(entropy)
        index = int(rng.integers(len(self._studies)))
        study, voxels, lesions = self._studies[index], self._voxels[index], self._lesions[index]
        aimed = rng.random() < self._lesion_share
        pool = lesions if aimed and lesions.size else voxels
        chosen = np.unravel_index(int(pool[int(rng.integers(pool.size))]), study.ct.shape)
        reach = int(self._window * JITTER)
        shift = rng.integers(-reach, reach + 1, 3)
        flips = (rng.random(3) < 0.5) & self._augment.flips
        angles = rng.uniform(-1, 1, 3) * self._augment.rotation_deg
        noise_seed = int(rng.integers(2**63))
        matrix = voxel_rotation(angles, study.record.spacing_mm) if self._augment.rotation_deg else np.eye(3)
        # moved along the turned and flipped axes, so that the chosen voxel stays inside the window
        moved = np.rint(matrix @ shift[::-1])[::-1] * np.where(flips, -1, 1)
        z, y, x = (int(c) + int(m) - self._window // 2 for c, m in zip(chosen, moved, strict=True))
        fz, fy, fx = (bool(flip) for flip in flips)
        return Placement(index, (z, y, x), (fz, fy, fx), matrix, noise_seed)

    def _with_noise(self, ct: Tensor, places: Sequence[Placement]) -> Tensor:
        """Air stays 0: it is what padding and masking leave, and no scanner's noise."""
        noise = torch.empty_like(ct)
        for row, place in zip(noise, places, strict=True):
            row.normal_(generator=self._generator.manual_seed(place.noise_seed))
        return noise.mul_(self._augment.ct_noise).mul_(ct > 0).add_(ct).clamp_(0, 1)

    def _channels(self, ct: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        if self._input_mask == "district":  # eq. 7, after scaling: 0 is air
            return ct * masks["own"]
        if self._input_mask == "channel":
            return torch.cat([ct, masks["own"]], dim=1)
        if self._input_mask == "districts":
            return torch.cat([ct * masks["body"], *(masks[district.key] for district in District)], dim=1)
        return ct * masks["body"]


def _choices(study: PreparedStudy, label: District | None) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Flat indices of the voxels, and of the lesion voxels, that patches of this study are aimed at.

    At most `MAX_CHOICES` of each, drawn once with a seed of the study's own: all indices of 710 scans would take
    more memory than the scans. With the jitter of a third of a window, every place of a district is still reached.
    """
    districts = np.asarray(study.districts)
    mask = districts > 0 if label is None else districts == label
    seed = zlib.crc32(study.id.encode())
    return _some(mask, seed), _some(mask & (np.asarray(study.lesions) > 0), seed)


def _some(mask: NDArray[np.bool_], seed: int) -> NDArray[np.uint32]:
    indices = np.flatnonzero(mask).astype(np.uint32)
    if indices.size <= MAX_CHOICES:
        return indices
    kept = np.random.default_rng(seed).choice(indices, MAX_CHOICES, replace=False, shuffle=False)
    return np.sort(kept)


def _tables(label: District | None, train: TrainRecipe, input_mask: str) -> dict[str, Tensor]:
    """What a voxel of each label (a district's number, plus `LESION` in a lesion) has in the weights and masks.

    Looked up, one mask costs a CPU half of what a comparison and a product with its result do.
    """
    body, own, weight = torch.zeros(3, 2 * LESION)
    tables = {"body": body, "weight": weight}
    if input_mask in ("district", "channel"):
        tables["own"] = own
    for district in District:
        numbers = [int(district), int(district) + LESION]
        is_own = label in (None, district)
        body[numbers], own[numbers] = 1, float(is_own)
        weight[numbers] = torch.tensor([1.0, train.lesion_weight]) * (1.0 if is_own else train.neighbor_weight)
        if input_mask == "districts":
            tables[district.key] = torch.zeros(2 * LESION).index_fill_(0, torch.tensor(numbers), 1)
    return tables


def cube_sides(window: int, rotation_deg: float, spacings_mm: Sequence[tuple[float, float, float]]) -> Triple:
    """Voxels (z, y, x) that hold the window however it is turned, so that no corner is empty.

    A row of |R| sums to what a window's half side can reach along that axis; |sin| is at most sin(rotation_deg)
    and |cos| at most 1. Each side has the window's parity, so that the window lies in the middle on whole voxels.
    """
    if not rotation_deg:
        return window, window, window
    s = math.sin(math.radians(rotation_deg))
    about_x, about_y, about_z = np.ones((3, 3, 3)) * [[[s]], [[s]], [[s]]]
    for axis, bound in enumerate((about_x, about_y, about_z)):
        bound[axis, :] = bound[:, axis] = 0
        np.fill_diagonal(bound, 1)
    reach = np.max([_in_voxels(about_z @ about_y @ about_x, spacing).sum(axis=1) for spacing in spacings_mm], axis=0)
    least = [math.ceil((window - 1) * r) + 1 for r in reach[::-1]]
    z, y, x = (side + (side - window) % 2 for side in least)
    return z, y, x


def voxel_rotation(angles_deg: NDArray[np.float64], spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """(3, 3): rotation by the angles about x, y and z in turn, acting on offsets (x, y, z) in voxels.

    `spacing_mm` is (z, y, x). The rotation is one of the patient, in mm: on a grid of oblong voxels the same matrix
    in voxels would shear.
    """
    a, b, c = np.radians(angles_deg)
    x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    y = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    z = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return _in_voxels(z @ y @ x, spacing_mm)


def _in_voxels(matrix_mm: NDArray[np.float64], spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    xyz = np.array(spacing_mm[::-1])
    turned: NDArray[np.float64] = matrix_mm * xyz[None, :] / xyz[:, None]
    return turned


def turn(images: Tensor, labels: Tensor, matrices: NDArray[np.float64], window: int) -> tuple[Tensor, Tensor]:
    """The window in the middle of each box, sampled along turned axes: images trilinear, labels nearest.

    Args:
        images: (N, C, Z, Y, X) float32.
        labels: (N, 1, Z, Y, X) uint8.
        matrices: (N, 3, 3), window offsets to box offsets in voxels, (x, y, z).
        window: side of the results.
    """
    sizes = np.array(images.shape[:1:-1])  # x, y, z
    theta = np.zeros((len(matrices), 3, 4))
    theta[:, :, :3] = matrices * (window - 1) / (sizes - 1)[None, :, None]
    # in double: with TF32 allowed, or under autocast, the coordinates would be rounded to parts of a voxel
    moved = torch.from_numpy(theta).to(images.device, non_blocking=True)
    grid = F.affine_grid(moved, [len(images), 1, window, window, window], align_corners=True).float()
    turned = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    nearest = F.grid_sample(labels.float(), grid, mode="nearest", padding_mode="zeros", align_corners=True)
    return turned, nearest.to(torch.uint8)
