"""The train loop: tasks, optimiser, one jitted step, checkpoints, metrics."""
