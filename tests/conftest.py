"""Settings of every test process: eight CPU devices and a cache of compiled programs.

They are environment variables, set before the first import of jax; what is set outside wins.
A program found in the cache is not compiled, so XLA logs nothing about it: a test that reads XLA's
log turns the cache off (`jax_enable_compilation_cache`).
"""

import os
from pathlib import Path

import hypothesis

_DEVICES = "--xla_force_host_platform_device_count"
_flags = os.environ.get("XLA_FLAGS", "")
if _DEVICES not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax")
)
# A bound on the size also makes jax lock the folder: test processes share it.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# The same examples in every run, and no deadline: the first call of a function compiles it.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None)
hypothesis.settings.load_profile("project")
