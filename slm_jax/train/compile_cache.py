"""Compiled programs are kept on the disk, so that a restart on an accelerator does not compile."""

import jax

from slm_jax.data.cache import cache_root


def keep_programs(platform: str) -> None:
    """Turns on jax's persistent cache of compiled programs; call before the first compilation.

    It lies in `SLM_JAX_CACHE`, or ~/.cache/slm_jax, below `programs`, for this user alone: what is
    in it is run. `JAX_COMPILATION_CACHE_DIR` names another place; `JAX_ENABLE_COMPILATION_CACHE=0`
    turns it off. A CPU keeps none of itself: XLA cannot store the products that the step
    leaves to oneDNN there, and what it stores is of one kind of processor only.

    Args:
        platform: of the devices, as jax calls it.
    """
    if platform == "cpu" or jax.config.jax_compilation_cache_dir is not None:
        return
    folder = cache_root(None) / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
