"""From a study as it lies on disk to volumes on one grid, with the split."""
