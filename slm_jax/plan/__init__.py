"""Preflight: what a run would need and how fast it could be on a slice that is not there.

The training step itself is compiled ahead of time for the slice, by the compiler that a TPU host
would use, so memory and communication are what that compiler made of them; times are bounds.
So is a prefill or a decode step (`Serving`).
"""

from slm_jax.plan.program import Compiled, compile_run
from slm_jax.plan.report import Plan, estimated_seconds, make_plan
from slm_jax.plan.serving import Serving

__all__ = ["Compiled", "Plan", "Serving", "compile_run", "estimated_seconds", "make_plan"]
