"""Training and evaluation of the district networks; imports ``pipeline`` and nothing else of ours."""
