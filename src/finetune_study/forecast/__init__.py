"""What a run will need: memory, time and cost, with no GPU, traced from the real model class on fake tensors."""
