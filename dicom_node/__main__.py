"""`python -m dicom_node`: the command line, for starters that want a module (torchrun)."""

from __future__ import annotations

from dicom_node.cli import main

if __name__ == "__main__":
    main()
