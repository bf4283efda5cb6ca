"""Preflight: what a run would need and how fast it could be on a slice that is not there.

The training step itself is compiled ahead of time for the slice, by the compiler that a TPU host
would use, so memory and communication are what that compiler made of them; times are bounds.
"""

from slm_jax.plan.program import Compiled, compile_run
from slm_jax.plan.report import Plan, make_plan

__all__ = ["Compiled", "Plan", "compile_run", "make_plan"]
