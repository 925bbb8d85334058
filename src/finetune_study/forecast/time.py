"""Time of an optimizer step from counted work against rates: what takes longest at each place is what it waits for."""
