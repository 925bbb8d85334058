"""What a run will need: memory, time and cost, with no GPU, traced from the real model class on fake tensors."""

VERSION = 9
"""Raise it when predictions change: forecasts are made anew; priors stay as they were."""

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "logits", "temporary", "communication", "context")
"""What memory is used for; each byte of the peak is in one of them."""
