"""The node on the hospital network: receives, selects, runs, delivers, and answers the administrator."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dicom-node")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0+source"
