"""A parametric phantom: stylised anatomy after MIRD-5 (ORNL/TM-8381), painted as CT and FDG PET on any grid.

For tests, the demonstration and the bundled weights. What is learned from it says nothing about patients.
"""

from __future__ import annotations

from training.phantom.paint import make_phantom
from training.phantom.spec import POSES, Disease, Lesion, Phantom, PhantomSpec, Pose

__all__ = ["POSES", "Disease", "Lesion", "Phantom", "PhantomSpec", "Pose", "make_phantom"]
