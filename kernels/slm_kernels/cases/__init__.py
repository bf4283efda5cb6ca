"""Named uses of the kernels: arguments by shape, and the least work that they can cost.

A case is compiled for every target by the tests (small shape) and by `slm_kernels.profile`.
"""

from slm_kernels.cases import attention, decode, experts, matmul, recurrence, scan, ssd
from slm_kernels.cases.case import Case, Work

CASES: dict[str, Case] = {
    **attention.CASES,
    **decode.CASES,
    **experts.CASES,
    **matmul.CASES,
    **recurrence.CASES,
    **scan.CASES,
    **ssd.CASES,
}

__all__ = ["CASES", "Case", "Work"]
