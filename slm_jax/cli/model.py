"""The preset that stands first on a command line."""

import textwrap
from collections.abc import Sequence

from slm_jax.models.presets import PRESETS

DEFAULT_PRESET = "tiny-dense"


def split_preset(args: Sequence[str]) -> tuple[str, list[str]]:
    """The preset's name and the options after it; without a name, `DEFAULT_PRESET`."""
    if args and not args[0].startswith("-"):
        return args[0], list(args[1:])
    return DEFAULT_PRESET, list(args)


def preset_list() -> str:
    """All names, for `--help`."""
    return textwrap.fill(", ".join(PRESETS), width=80)
