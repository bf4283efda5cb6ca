"""Floating-point operations of a model, counted from its configuration, and peaks of accelerators.

What is counted, per token: every matrix product (2 x inputs x outputs), attention's two products,
the short convolution and the scan of an SSM. What is not: norms, activations, softmax, rotary
embeddings, biases, residual additions and the embedding lookup, which are elementwise or reads.
XLA's own estimate is not used: it counts the body of a scan once.

The model FLOPs utilisation of arXiv 2204.02311 (appendix B) is
`training_flops(config, seq_len, remat="none") x tokens/s / (devices x peak_flops(device))`; that
paper counts attention in full (`causal=False`), most later reports count the causal half.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from slm_jax.errors import UserError
from slm_jax.models.lm import LMConfig
from slm_jax.models.recursion import expected_runs


@dataclass(frozen=True)
class FlopBreakdown:
    """Operations of one forward pass per token, on average over a row; a part absent is 0."""

    attention_projections: float = 0.0
    """Query, key, value and output matrices."""
    attention_products: float = 0.0
    """Queries times keys, and weights times values."""
    mlp: float = 0.0
    """Dense feed-forward layers."""
    router: float = 0.0
    """Router logits, and the weighted sum of the chosen experts' outputs."""
    experts: float = 0.0
    """The top_k experts a token is sent to; neither capacity padding nor dropped tokens."""
    recurrent_projections: float = 0.0
    """Input, gate, selection, step-size and output matrices of an SSM."""
    recurrence: float = 0.0
    """Convolution (2 x taps a channel) and scan (`slm_jax.nn.ssm.SCAN_FLOPS_PER_STATE`)."""
    injection: float = 0.0
    """The adapter that feeds repeated layers their input again (`RecursionConfig.injection`)."""
    head: float = 0.0
    """Logits, tied or not."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def matmul(self) -> float:
        """All matrix products: everything but `recurrence`."""
        return self.total - self.recurrence


def forward_flops(config: LMConfig, seq_len: int, *, causal: bool = True) -> FlopBreakdown:
    """Operations per token of the forward pass over a row of one document.

    Repeated layers count `recursion.repeats` times; with a tolerance that is the most.

    Args:
        config: the model.
        seq_len: tokens of the row.
        causal: count only the keys that a query may see (causal mask and window), as a kernel
            that skips masked blocks computes them; false counts all `seq_len` keys in every
            attention layer, as plain masked products do.

    Raises:
        UserError: if `seq_len` is not positive.
    """
    if seq_len < 1:
        raise UserError(f"seq_len={seq_len} must be at least 1")
    repeats = 1 if config.recursion is None else config.recursion.repeats
    return _breakdown(config, seq_len, causal, repeats)


def _breakdown(config: LMConfig, seq_len: int, causal: bool, runs: float) -> FlopBreakdown:
    """Operations per token of a forward pass whose shared layers run `runs` times."""
    parts = dict.fromkeys((f.name for f in fields(FlopBreakdown)), 0.0)
    recursion = config.recursion
    for i in range(config.n_layers):
        layer = config.layer(i)
        shared = recursion is not None and recursion.shares(i)
        found = layer.mixer.flops(config.d_model, seq_len, causal)
        if layer.channel is not None:
            found = found | layer.channel.flops(config.d_model)
        for name, flops in found.items():
            parts[name] += flops * (runs if shared else 1)
    if recursion is not None and recursion.injection == "concat":
        parts["injection"] += runs * 4 * config.d_model**2
    parts["head"] += 2 * config.d_model * config.vocab_size
    return FlopBreakdown(**parts)


def training_flops(
    config: LMConfig,
    seq_len: int,
    remat: Literal["none", "full", "dots"] | None = None,
    *,
    causal: bool = True,
) -> float:
    """Operations per token of a training step: forward, twice that backward, recomputation.

    Args:
        config: the model.
        seq_len: tokens of a row.
        remat: what the backward pass recomputes; `None` is `config.remat`, and `"none"` gives the
            model FLOPs of an MFU whatever the run recomputes. `"full"` adds a forward of the layers
            without the head (an upper bound: the last product of a period is not needed again).
            `"dots"` keeps the products with plain matrices and adds those that are batched, which
            its policy does not keep: attention's products and the experts (not their weighted sum,
            which is needed again only inside a period); and the SSM scan. What a kernel recomputes
            within its own backward pass is not counted. Repeated layers count as often as they
            run on average, backward and recomputed where the gradient passes.
        causal: as in `forward_flops`.

    Raises:
        UserError: if `seq_len` is not positive or `remat` is none of the three.
    """
    remat = config.remat if remat is None else remat
    forward = through = forward_flops(config, seq_len, causal=causal)
    if config.recursion is not None:
        runs = expected_runs(config.recursion)
        forward = _breakdown(config, seq_len, causal, runs.forward)
        through = _breakdown(config, seq_len, causal, runs.backward)
    recomputed = {
        "none": 0.0,
        "full": through.total - through.head - through.injection,
        "dots": through.attention_products + through.experts + through.recurrence,
    }
    if remat not in recomputed:
        raise UserError(f"remat={remat!r} is not known: choose {', '.join(recomputed)}")
    return forward.total + 2 * through.total + recomputed[remat]


@dataclass(frozen=True)
class Accelerator:
    """Vendor's figures of one chip."""

    bf16: float
    """Dense bfloat16 matrix products, FLOP/s."""
    hbm: float
    """Memory bandwidth, bytes/s."""
    cores: int = 1
    """TensorCores a chip; a jax device is one of them or, with megacore, all."""


_V4 = Accelerator(275e12, 1228e9, cores=2)
_V5E = Accelerator(197e12, 819e9)
_V5P = Accelerator(459e12, 2765e9, cores=2)
_V6E = Accelerator(918e12, 1638e9)
_A100 = 312e12
_HOPPER_SXM = 989e12

# Google's Cloud TPU pages and NVIDIA's data sheets, without sparsity. Keys are jax's `device_kind`,
# whole: the PCIe and NVL boards of a GPU are slower than its SXM module, so no name is guessed.
PEAK_FLOPS: dict[str, Accelerator] = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    # 4614e12 in fp8. Two jax devices a chip: it has no megacore.
    "TPU7x": Accelerator(2307e12, 7380e9, cores=2),
    "NVIDIA A100-SXM4-40GB": Accelerator(_A100, 1555e9),
    "NVIDIA A100-SXM4-80GB": Accelerator(_A100, 2039e9),
    "NVIDIA H100 80GB HBM3": Accelerator(_HOPPER_SXM, 3350e9),
    "NVIDIA H200": Accelerator(_HOPPER_SXM, 4800e9),
}


def peak_flops(device: Any) -> float | None:
    """Peak of dense bfloat16 products on one jax device, FLOP/s.

    Args:
        device: a `jax.Device`, real or of a topology description.

    Returns:
        The chip's peak times the share of its TensorCores that the device drives (half a chip on
        TPU7x), or `None` if the kind is not in `PEAK_FLOPS`, CPUs among them: then no MFU.
    """
    chip = PEAK_FLOPS.get(device.device_kind)
    if chip is None:
        return None
    return chip.bf16 if chip.cores == 1 else chip.bf16 * device.num_cores / chip.cores
