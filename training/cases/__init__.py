"""Cohorts of FDG-PET/CT studies in the three published layouts, told apart by content.

`find_studies` looks at names, headers and the metadata table only; `read_study` reads one study's voxels.
"""

from training.cases.find import find_studies
from training.cases.read import read_study
from training.cases.types import Cohort, Labels, Layout, Study, StudyVolumes

__all__ = ["Cohort", "Labels", "Layout", "Study", "StudyVolumes", "find_studies", "read_study"]
