"""Pix2Pix and CycleGAN: losses, discriminators, and one explicit step of each."""
