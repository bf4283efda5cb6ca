"""Published models, as the `config.json` of the Hugging Face repository named over each entry.

They compute in bfloat16, as they were trained, over float32 weights;
`dataclasses.replace(preset(name), dtype="float32")` is the form to compare with another library.
"""

from typing import Final

from slm_jax.models.lm import LMConfig
from slm_jax.models.presets.build import dense, hybrid, mamba, moe
from slm_jax.models.presets.longrope import PHI_3_5_MOE, PHI_4_MINI
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.norm import NormConfig
from slm_jax.nn.rope import Llama3Scaling, RopeConfig

_BF16: Final = "bfloat16"
_EPS6 = NormConfig(eps=1e-6)
_GEMMA_NORM = NormConfig(eps=1e-6, scale="unit_offset")


def _gemma_2_layer(window: int | None) -> LayerConfig:
    attention = AttentionConfig(16, 8, 256, window=window, softcap=50.0)
    return LayerConfig(attention, MLPConfig(14_336, "gelu_tanh"), norm_position="sandwich")


PUBLISHED: dict[str, LMConfig] = {
    # GQA, tied head, Llama 3.1 rotary scaling: meta-llama/Llama-3.2-1B (arXiv 2407.21783).
    "llama-3.2-1b": dense(
        d_model=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        d_ff=8192,
        vocab_size=128_256,
        max_seq_len=131_072,
        dtype=_BF16,
        rope=RopeConfig(theta=500_000.0, scaling=Llama3Scaling(32.0, 8192)),
    ),
    # Llama 2 at 1.1B: TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T (arXiv 2401.02385).
    "tinyllama-1.1b": dense(
        d_model=2048,
        n_layers=22,
        n_heads=32,
        n_kv_heads=4,
        d_ff=5632,
        vocab_size=32_000,
        max_seq_len=2048,
        dtype=_BF16,
        tie_embeddings=False,
    ),
    # Deep and thin: HuggingFaceTB/SmolLM2-135M (arXiv 2502.02737).
    "smollm2-135m": dense(
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        d_ff=1536,
        vocab_size=49_152,
        max_seq_len=8192,
        dtype=_BF16,
        rope=RopeConfig(theta=100_000.0),
    ),
    # GQA and a sliding window: mistralai/Mistral-7B-v0.1 (arXiv 2310.06825, table 1).
    "mistral-7b": dense(
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14_336,
        vocab_size=32_000,
        max_seq_len=32_768,
        dtype=_BF16,
        tie_embeddings=False,
        window=4096,
    ),
    # MQA with heads of 256, GeGLU: google/gemma-2b (arXiv 2403.08295, table 1).
    "gemma-2b": LMConfig(
        vocab_size=256_000,
        d_model=2048,
        n_layers=18,
        pattern=(LayerConfig(AttentionConfig(8, 1, 256), MLPConfig(16_384, "gelu_tanh")),),
        norm=_GEMMA_NORM,
        embedding_scale=2048**0.5,
        max_seq_len=8192,
        dtype=_BF16,
    ),
    # A window in every other layer, soft-caps, four norms: google/gemma-2-9b (arXiv 2408.00118).
    "gemma-2-9b": LMConfig(
        vocab_size=256_000,
        d_model=3584,
        n_layers=42,
        pattern=(_gemma_2_layer(4096), _gemma_2_layer(None)),
        norm=_GEMMA_NORM,
        embedding_scale=3584**0.5,
        final_softcap=30.0,
        max_seq_len=8192,
        dtype=_BF16,
    ),
    # MHA: microsoft/Phi-3-mini-4k-instruct (arXiv 2404.14219).
    "phi-3-mini": dense(
        d_model=3072,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        d_ff=8192,
        vocab_size=32_064,
        max_seq_len=4096,
        dtype=_BF16,
        tie_embeddings=False,
        window=2047,
    ),
    # GQA, three quarters of a head rotate, LongRoPE: microsoft/Phi-4-mini-instruct (2503.01743).
    # Its config names a window of 262,144, twice the longest context: none in effect.
    "phi-4-mini": dense(
        d_model=3072,
        n_layers=32,
        n_heads=24,
        n_kv_heads=8,
        d_ff=8192,
        vocab_size=200_064,
        max_seq_len=131_072,
        dtype=_BF16,
        rope=RopeConfig(fraction=0.75, scaling=PHI_4_MINI),
    ),
    # 14B: microsoft/phi-4 (arXiv 2412.08905).
    "phi-4": dense(
        d_model=5120,
        n_layers=40,
        n_heads=40,
        n_kv_heads=10,
        d_ff=17_920,
        vocab_size=100_352,
        max_seq_len=16_384,
        dtype=_BF16,
        tie_embeddings=False,
        rope=RopeConfig(theta=250_000.0),
    ),
    # Two of eight experts: mistralai/Mixtral-8x7B-v0.1 (arXiv 2401.04088, table 1).
    "mixtral-8x7b": moe(
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14_336,
        n_experts=8,
        vocab_size=32_000,
        max_seq_len=32_768,
        dtype=_BF16,
        tie_embeddings=False,
        rope=RopeConfig(theta=1_000_000.0),
    ),
    # Two of 16 experts by sparsemixer: microsoft/Phi-3.5-MoE-instruct (arXiv 2404.14219).
    # Its config names a window of 131,072, the longest context: none in effect.
    "phi-3.5-moe": LMConfig(
        vocab_size=32_064,
        d_model=4096,
        n_layers=32,
        pattern=(
            LayerConfig(
                AttentionConfig(
                    32, 8, 128, RopeConfig(scaling=PHI_3_5_MOE), qkv_bias=True, out_bias=True
                ),
                MoEConfig(16, 6400, 2, routing="sparsemixer"),
            ),
        ),
        norm=NormConfig("layer", bias=True),
        tie_embeddings=False,
        head_bias=True,
        max_seq_len=131_072,
        dtype=_BF16,
    ),
    # Selective scans only: state-spaces/mamba-130m-hf (arXiv 2312.00752). Trained at 2048 tokens.
    "mamba-130m": mamba(
        d_model=768,
        n_layers=24,
        vocab_size=50_280,
        max_seq_len=2048,
        dtype=_BF16,
        residual_dtype="float32",
    ),
    # The largest of that paper: state-spaces/mamba-2.8b-hf.
    "mamba-2.8b": mamba(
        d_model=2560,
        n_layers=64,
        vocab_size=50_280,
        max_seq_len=2048,
        dtype=_BF16,
        residual_dtype="float32",
    ),
    # One attention layer in eight, experts in every other: ai21labs/Jamba-v0.1 (arXiv 2403.19887).
    "jamba": hybrid(
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14_336,
        n_experts=16,
        vocab_size=65_536,
        max_seq_len=262_144,
        dtype=_BF16,
        tie_embeddings=False,
        norm=_EPS6,
    ),
    # QK-norm, heads wider than d_model / n_heads: Qwen/Qwen3-0.6B (arXiv 2505.09388).
    "qwen3-0.6b": dense(
        d_model=1024,
        n_layers=28,
        n_heads=16,
        n_kv_heads=8,
        d_ff=3072,
        vocab_size=151_936,
        max_seq_len=40_960,
        dtype=_BF16,
        norm=_EPS6,
        head_dim=128,
        qk_norm="head",
        rope=RopeConfig(theta=1_000_000.0),
    ),
    # Qwen2.5-Math, head untied: deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B (arXiv 2501.12948).
    "deepseek-r1-distill-qwen-1.5b": dense(
        d_model=1536,
        n_layers=28,
        n_heads=12,
        n_kv_heads=2,
        d_ff=8960,
        vocab_size=151_936,
        max_seq_len=131_072,
        dtype=_BF16,
        norm=_EPS6,
        tie_embeddings=False,
        qkv_bias=True,
    ),
    # The same at 7B: deepseek-ai/DeepSeek-R1-Distill-Qwen-7B.
    "deepseek-r1-distill-qwen-7b": dense(
        d_model=3584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        d_ff=18_944,
        vocab_size=152_064,
        max_seq_len=131_072,
        dtype=_BF16,
        norm=_EPS6,
        tie_embeddings=False,
        qkv_bias=True,
    ),
}
