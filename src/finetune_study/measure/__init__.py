"""What is measured of a run, one instrument per module."""
