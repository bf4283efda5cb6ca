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
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import MambaConfig

SCAN_FLOPS_PER_STATE = 7
"""Operations of the selective scan on one state value: dt a, exp, decay h, (dt u) b, their sum,
c h, and adding that up. It is the sequential recurrence of `slm_kernels.scan`, whatever kernel
runs; the 9 often quoted (state-spaces/mamba issue 110) are those of a parallel prefix scan."""

SCAN_FLOPS_PER_CHANNEL = 3
"""And on one channel: dt u, d u, and adding the skip."""


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
    ssm_projections: float = 0.0
    """Input, gate, selection, step-size and output matrices of an SSM."""
    ssm_scan: float = 0.0
    """Convolution (2 x taps a channel) and scan (`SCAN_FLOPS_PER_STATE`)."""
    head: float = 0.0
    """Logits, tied or not."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def matmul(self) -> float:
        """All matrix products: everything but `ssm_scan`."""
        return self.total - self.ssm_scan


def visible_keys(seq_len: int, window: int | None = None) -> float:
    """Keys a causal query sees, itself included, on average over the positions of a row."""
    w = seq_len if window is None else min(window, seq_len)
    return (w * (w + 1) // 2 + (seq_len - w) * w) / seq_len


def forward_flops(config: LMConfig, seq_len: int, *, causal: bool = True) -> FlopBreakdown:
    """Operations per token of the forward pass over a row of one document.

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
    parts = dict.fromkeys((f.name for f in fields(FlopBreakdown)), 0.0)
    for i in range(config.n_layers):
        for name, flops in _layer_flops(config.layer(i), config.d_model, seq_len, causal):
            parts[name] += flops
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
            within its own backward pass is not counted.
        causal: as in `forward_flops`.

    Raises:
        UserError: if `seq_len` is not positive or `remat` is none of the three.
    """
    remat = config.remat if remat is None else remat
    forward = forward_flops(config, seq_len, causal=causal)
    recomputed = {
        "none": 0.0,
        "full": forward.total - forward.head,
        "dots": forward.attention_products + forward.experts + forward.ssm_scan,
    }
    if remat not in recomputed:
        raise UserError(f"remat={remat!r} is not known: choose {', '.join(recomputed)}")
    return 3 * forward.total + recomputed[remat]


def _layer_flops(
    layer: LayerConfig, d_model: int, seq_len: int, causal: bool
) -> list[tuple[str, float]]:
    """Pairs of a part's name and its operations per token in one layer."""
    found: list[tuple[str, float]] = []
    match layer.mixer:
        case AttentionConfig() as a:
            width = a.n_heads * a.head_dim
            heads = 2 * a.n_heads + 2 * a.n_kv_heads
            keys = visible_keys(seq_len, a.window) if causal else seq_len
            found.append(("attention_projections", 2 * d_model * heads * a.head_dim))
            found.append(("attention_products", 4 * width * keys))
        case MambaConfig() as m:
            rank = m.resolved_dt_rank(d_model)
            inputs_outputs = 3 * d_model * m.d_inner
            selection = m.d_inner * (rank + 2 * m.d_state) + rank * m.d_inner
            per_channel = 2 * m.d_conv + SCAN_FLOPS_PER_STATE * m.d_state + SCAN_FLOPS_PER_CHANNEL
            found.append(("ssm_projections", 2 * (inputs_outputs + selection)))
            found.append(("ssm_scan", per_channel * m.d_inner))
    match layer.channel:
        case MLPConfig() as f:
            found.append(("mlp", 2 * d_model * f.d_ff * (3 if f.gated else 2)))
        case MoEConfig() as e:
            found.append(("router", 2 * d_model * (e.n_experts + e.top_k)))
            found.append(("experts", 2 * d_model * e.d_ff * 3 * e.top_k))
    return found


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
