"""Which code a run is of."""

import functools
import subprocess
from pathlib import Path

from slm_jax import __version__

_PACKAGE = Path(__file__).parent.parent


@functools.cache
def code_version() -> dict[str, str | None]:
    """Version of the package and, in a git checkout of it, the commit.

    Returns:
        `version`, and `commit`, which ends in `-dirty` if files were changed since; `None` for an
        installed package.
    """
    # A package installed below somebody else's checkout is not of their commit.
    ours = _git("ls-files", "--error-unmatch", "__init__.py")
    commit = _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty") if ours else None
    return {"version": __version__, "commit": commit}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
