"""What a process ends with, for whoever started it; 0 is done, 1 a fault of the program."""

MISTAKE = 2
"""A mistake in what was asked for: the same command fails again."""
PREEMPTED = 42
"""Told to stop, and saved: the same command goes on."""
HANGING = 43
"""A step did not end: the same command goes on from the newest checkpoint."""
DIVERGED = 44
"""The loss is no longer finite: the same command diverges again."""
LOST = 134
"""Another process of the job is gone: that of jax's own abort, on which launchers restart."""
