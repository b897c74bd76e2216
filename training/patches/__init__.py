"""Training patches: cut, masked and augmented, on the CPU or on the device."""
