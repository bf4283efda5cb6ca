"""Named uses of the kernels: arguments by shape, and the least work that they can cost.

A case is compiled for every target by the tests (small shape) and by `slm_kernels.profile`.
"""

from slm_kernels.cases import attention, scan
from slm_kernels.cases.case import Case, Work

CASES: dict[str, Case] = {**attention.CASES, **scan.CASES}

__all__ = ["CASES", "Case", "Work"]
