"""A stand-in for the package of this name: gives recorded label maps."""
