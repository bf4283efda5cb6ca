"""Named configurations, constructors of the usual shapes, and sizes of a model."""

from slm_jax.errors import named
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets.build import dense, hybrid, mamba, moe
from slm_jax.models.presets.published import PUBLISHED
from slm_jax.models.presets.size import ModelSummary, state_bytes, summary
from slm_jax.models.recursion import RecursionConfig

# About a million parameters each over bytes, for tests and demonstrations on a CPU.
_TINY: dict[str, LMConfig] = {
    # Llama-like, GQA.
    "tiny-dense": dense(128, 4, 4, 2, 512, max_seq_len=512),
    # The same with each MLP cut into four experts, two of them active.
    "tiny-moe": moe(128, 4, 4, 2, 128, n_experts=4, max_seq_len=512),
    # Selective scans only.
    "tiny-mamba": mamba(128, 8, max_seq_len=512),
    # Jamba in four layers: scan, scan with experts, attention, scan with experts.
    "tiny-hybrid": hybrid(
        128, 4, 4, 2, 128, attention_period=4, attention_offset=2, n_experts=4, max_seq_len=512
    ),
    # tiny-dense with its two inner layers run about four times, as in arXiv 2502.05171.
    "tiny-looped": dense(
        128,
        4,
        4,
        2,
        512,
        max_seq_len=512,
        recursion=RecursionConfig(1, 2, repeats=4, sampling="poisson", backward=4),
    ),
}

PRESETS: dict[str, LMConfig] = PUBLISHED | _TINY


def preset(name: str) -> LMConfig:
    """The configuration called `name`.

    Raises:
        UserError: if there is none; names the closest ones.
    """
    return named("preset", name, PRESETS)


__all__ = [
    "PRESETS",
    "ModelSummary",
    "dense",
    "hybrid",
    "mamba",
    "moe",
    "preset",
    "state_bytes",
    "summary",
]
