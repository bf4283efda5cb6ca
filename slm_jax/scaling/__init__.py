"""Scaling laws: tables of runs, laws, fits with intervals, isoFLOP curves, effective size."""

from slm_jax.scaling.fit import Fit, fit, objective
from slm_jax.scaling.intervals import Bootstrap, Profile, bootstrap, profile
from slm_jax.scaling.laws import LAWS, Law, Published
from slm_jax.scaling.optimum import (
    Optimum,
    Serving,
    compute_optimal,
    deadweight_compute,
    exponents,
    inference_aware,
    loss_to_compute,
    near_optimal,
    tokens_to_loss,
)
from slm_jax.scaling.rows import Dropped, Rows, admissible, read_csv

__all__ = [
    "LAWS",
    "Bootstrap",
    "Dropped",
    "Fit",
    "Law",
    "Optimum",
    "Profile",
    "Published",
    "Rows",
    "Serving",
    "admissible",
    "bootstrap",
    "compute_optimal",
    "deadweight_compute",
    "exponents",
    "fit",
    "inference_aware",
    "loss_to_compute",
    "near_optimal",
    "objective",
    "profile",
    "read_csv",
    "tokens_to_loss",
]
