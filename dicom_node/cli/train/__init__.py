"""`dicom-node train …`: from a folder of FDG-PET/CT studies to a bundle. The only place that imports training.

One file per command; each registers itself on `app`. They import the training package when they run, not before:
`serve` and `--help` must not load torch.
"""

from __future__ import annotations

import typer

app = typer.Typer(
    help="From a folder of FDG-PET/CT studies to a bundle: prepare, train, evaluate, export.", no_args_is_help=True
)

# each registers its command on `app`; in the order of the work, as `--help` shows them
from dicom_node.cli.train import phantom  # noqa: E402, F401, I001
from dicom_node.cli.train import prepare  # noqa: E402, F401
from dicom_node.cli.train import run  # noqa: E402, F401
from dicom_node.cli.train import all as _all  # noqa: E402, F401
from dicom_node.cli.train import evaluate  # noqa: E402, F401
from dicom_node.cli.train import ablation  # noqa: E402, F401
from dicom_node.cli.train import export  # noqa: E402, F401
from dicom_node.cli.train import recipes  # noqa: E402, F401
from dicom_node.cli.train import districts  # noqa: E402, F401
