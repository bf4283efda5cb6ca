"""StableHLO: a model as programs and weights that run wherever jax does, without this project.

Read in this order: programs.py (what is exported), folder.py (how it is written), run.py (what is
put beside it and reads it; it imports nothing of ours).
"""

from slm_jax.export.stablehlo.folder import check_out, save_stablehlo
from slm_jax.export.stablehlo.programs import PLATFORMS, Programs, export_programs

__all__ = ["PLATFORMS", "Programs", "check_out", "export_programs", "save_stablehlo"]
