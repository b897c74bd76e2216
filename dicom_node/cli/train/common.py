"""What the training commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from dicom_node.cli.common import console_err, fail


@contextmanager
def refused() -> Iterator[None]:
    """Turn what training refuses into one line and exit 1, and Ctrl-C into a word that the same command goes on."""
    try:
        from training.errors import TrainingError
        from training.recipe import RecipeError
    except ImportError as error:  # a node without the training extra
        raise fail(f"training needs the extra packages: pip install 'dicom-node[train]' ({error.name})") from error
    try:
        yield
    except (TrainingError, RecipeError) as error:
        raise fail(str(error)) from error
    except OSError as error:  # what no part foresaw: a folder of someone else, a disk that fills between two files
        raise fail(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    except KeyboardInterrupt as error:
        console_err.print("interrupted: the same command goes on from here")
        raise typer.Exit(130) from error
