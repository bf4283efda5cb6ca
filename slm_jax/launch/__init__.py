"""Launchers: the text that starts a run on every host of a slice, and the tool that takes it."""

from slm_jax.launch.job import Job
from slm_jax.launch.launchers import LAUNCHERS, Launcher, render, submit

__all__ = ["LAUNCHERS", "Job", "Launcher", "render", "submit"]
