"""What a run will need: memory, time and cost, with no GPU, traced from the real model class on fake tensors."""

VERSION = 1
"""Raise it when predictions change: forecasts are made anew; priors stay as they were."""
