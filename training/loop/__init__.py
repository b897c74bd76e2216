"""Training one network, and all of them: steps, checkpoints, validation, several processes."""
