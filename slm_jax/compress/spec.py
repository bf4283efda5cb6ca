"""How weights and activations are to be stored: a frozen description, and its short name."""

import re
from dataclasses import dataclass
from typing import Literal

from slm_jax.errors import UserError

Code = Literal["int8", "int4", "int3", "nf4"]
BITS: dict[Code, int] = {"int8": 8, "int4": 4, "int3": 3, "nf4": 4}


@dataclass(frozen=True)
class QuantSpec:
    """One format of a weight matrix."""

    code: Code = "int8"
    """Symmetric integers of 8, 4 or 3 bits, or the 16 levels of NF4 (arXiv 2305.14314)."""
    group: int | None = None
    """Inputs that share a scale; `None`: all inputs of an output do."""
    activations: Literal["float", "int8"] = "float"
    """Multiply as floats, or round each token to int8 and multiply integers."""

    def __post_init__(self) -> None:
        if self.code not in BITS:
            raise UserError(f"code={self.code!r} is unknown: choose from {', '.join(BITS)}")
        if self.group is not None and self.group < 2:
            raise UserError(f"group={self.group} must be at least 2, or None for one scale a row")
        if self.activations == "int8" and (self.group is not None or self.code == "nf4"):
            raise UserError(
                f"activations='int8' with {self.code} and group={self.group}: an integer product "
                "needs integer codes with one scale an output: choose w8a8, w4a8 or w3a8"
            )

    @property
    def bits(self) -> int:
        """Bits of a code, its share of a scale not counted."""
        return BITS[self.code]

    @property
    def name(self) -> str:
        """The short name that `parse_spec` reads."""
        code = self.code if self.code == "nf4" else f"w{self.bits}"
        activations = "a8" if self.activations == "int8" else ""
        return code + activations + ("" if self.group is None else f"g{self.group}")


def parse_spec(name: str) -> QuantSpec:
    """The format called `w8`, `w8a8`, `w4`, `w4a8`, `w4g32`, `w3g32`, `nf4g64` and so on.

    Raises:
        UserError: if there is no such format.
    """
    match = re.fullmatch(r"(w8|w4|w3|nf4)(a8)?(?:g([0-9]{1,6}))?", name)
    if match is None:
        raise UserError(
            f"spec={name!r} is no format: give w8, w4, w3 or nf4, then a8 for integer products or "
            "gN for groups of N inputs, as in w8a8, w4g32, nf4g64"
        )
    codes: dict[str, Code] = {"w8": "int8", "w4": "int4", "w3": "int3", "nf4": "nf4"}
    code, activations, group = match.groups()
    return QuantSpec(
        codes[code], None if group is None else int(group), "int8" if activations else "float"
    )
