"""The mathematics of an update: pure functions of tensors and floats."""
