import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core as jex
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from slm_kernels.attention.mask import visible
from slm_kernels.scan import causal_conv1d, selective_scan

from slm_jax.errors import UserError
from slm_jax.models.flops import (
    PEAK_FLOPS,
    forward_flops,
    peak_flops,
    training_flops,
)
from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.presets import PRESETS, dense, hybrid, mamba, moe, preset, summary
from slm_jax.models.recursion import RecursionConfig
from slm_jax.nn.attention import AttentionConfig, visible_keys
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import SCAN_FLOPS_PER_CHANNEL, SCAN_FLOPS_PER_STATE

BATCH, LENGTH = 2, 64
ARITHMETIC = {"add", "sub", "mul", "div", "exp", "neg"}


def operations(jaxpr: jex.Jaxpr) -> tuple[int, int]:
    """Operations of the matrix products and of the elementwise arithmetic of a program."""
    products = elementwise = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        out = eqn.outvars[0].aval if eqn.outvars else None
        assert name not in ("while", "cond", "ragged_dot_general"), "has no fixed count"
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            products += 2 * math.prod(out.shape) * terms
        elif name in ARITHMETIC:
            elementwise += math.prod(out.shape)
        elif name == "reduce_sum":
            elementwise += math.prod(eqn.invars[0].aval.shape)
        times = eqn.params["length"] if name == "scan" else 1
        for inner in jax.tree.leaves(
            eqn.params, is_leaf=lambda p: isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)
        ):
            if isinstance(inner, jex.Jaxpr | jex.ClosedJaxpr):
                inner = inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner
                more = operations(inner)
                products, elementwise = products + times * more[0], elementwise + times * more[1]
    return products, elementwise


def traced(config: LMConfig, *, gradient: bool = False) -> float:
    """Matrix-product operations per token in the program of a forward pass, or with backward."""

    def run(model: LM, tokens: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(model(tokens)[0]))

    model = jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    program = jax.make_jaxpr(jax.grad(run) if gradient else run)(model, tokens)
    return operations(program.jaxpr)[0] / (BATCH * LENGTH)


def fixed_capacity(config: LMConfig) -> LMConfig:
    """The model with exactly top_k slots a token: its program has no expert padding."""

    def layer(old: LayerConfig) -> LayerConfig:
        if not isinstance(old.channel, MoEConfig):
            return old
        exact = replace(old.channel, dispatch="capacity", capacity_factor=1.0)
        return replace(old, channel=exact)

    return replace(config, pattern=tuple(map(layer, config.pattern)))


ODD = {
    "partial-period": hybrid(32, 7, 2, 1, 64, attention_period=3, attention_offset=1, n_experts=4),
    "parallel-ungated": LMConfig(
        50,
        24,
        3,
        (LayerConfig(AttentionConfig(3, 1, 10), MLPConfig(40, gated=False), parallel=True),),
    ),
    "window": dense(32, 3, 4, 2, window=9, qkv_bias=True, tie_embeddings=False),
    "wide-heads": dense(32, 2, 2, 1, 48, head_dim=48, qk_norm="full"),
    "mqa": dense(32, 2, 4, 1),
    "mha": dense(32, 2, 4),
    "top-1": moe(32, 2, 2, n_experts=4, top_k=1),
    "small-state": mamba(32, 3, d_state=5, expand=3),
}


@pytest.mark.parametrize("name", [*PRESETS, *ODD])
def test_forward_equals_the_products_of_the_traced_program(name: str) -> None:
    config = fixed_capacity(ODD.get(name) or preset(name))
    assert traced(config) == forward_flops(config, LENGTH, causal=False).matmul


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-hybrid"])
def test_dropless_experts_run_the_formula_and_their_padding(name: str) -> None:
    # On CPU each expert's rows are padded to whole blocks, of about half a balanced group: at most
    # half as many rows again. Everything else is equal.
    config = preset(name)
    counted = forward_flops(config, LENGTH, causal=False)
    experts = traced(config) - (counted.matmul - counted.experts)
    assert counted.experts < experts <= 1.6 * counted.experts


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-mamba"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_training_equals_the_products_of_the_traced_gradient(name: str, remat: Any) -> None:
    config = replace(fixed_capacity(preset(name)), remat=remat)
    forward = forward_flops(config, LENGTH, causal=False)
    counted = training_flops(config, LENGTH, causal=False)
    counted -= forward.recurrence * (3 if remat == "none" else 4)  # no product
    assert traced(config, gradient=True) == counted


def test_full_remat_repeats_the_layers() -> None:
    # With norms after the branches every product is needed again ...
    config = replace(preset("gemma-2-9b"), remat="full")
    counted = training_flops(config, LENGTH, causal=False)
    assert traced(config, gradient=True) == counted
    # ... without them the down projection at the end of each period is not.
    config = replace(preset("tiny-dense"), remat="full")
    down = 2 * 512 * 128 * config.n_layers
    counted = training_flops(config, LENGTH, causal=False)
    assert traced(config, gradient=True) == counted - down


def test_training_counts_the_repeated_layers_that_have_a_gradient() -> None:
    recursion = RecursionConfig(1, 2, repeats=3, backward=2)
    config = replace(preset("tiny-looped"), recursion=recursion)
    counted = training_flops(config, LENGTH, causal=False)
    assert traced(config, gradient=True) == counted
    assert counted < 3 * forward_flops(config, LENGTH, causal=False).total


@pytest.mark.parametrize("window", [None, 1, 7, 63, 64, 100])
def test_visible_keys_is_the_mean_of_the_mask(window: int | None) -> None:
    positions = jnp.arange(LENGTH)[None]
    mask = visible(positions, positions, None, None, causal=True, window=window)
    assert visible_keys(LENGTH, window) == float(jnp.sum(mask)) / LENGTH


def test_causal_attention_counts_visible_keys_layer_by_layer() -> None:
    config = preset("gemma-2-9b")  # 21 layers see 4096 keys, 21 see all
    full = forward_flops(config, 8192, causal=False)
    causal = forward_flops(config, 8192)
    per_key = 4 * 16 * 256
    assert full.attention_products == 42 * per_key * 8192
    windowed = (4096 * 4097 // 2 + 4096 * 4096) / 8192
    assert causal.attention_products == 21 * per_key * (windowed + 8193 / 2)
    assert replace(causal, attention_products=0.0) == replace(full, attention_products=0.0)


def test_scan_counts_the_arithmetic_of_the_reference() -> None:
    length, width, states, taps = 3, 10, 4, 4
    u, bc = jnp.ones((1, length, width)), jnp.ones((1, length, states))
    a, d = jnp.ones((width, states)), jnp.ones(width)
    scan = jax.make_jaxpr(lambda *args: selective_scan(*args, implementation="reference"))(
        u, u, a, bc, bc, d
    )
    per_token = SCAN_FLOPS_PER_STATE * width * states + SCAN_FLOPS_PER_CHANNEL * width
    assert operations(scan.jaxpr) == (0, length * per_token)
    conv = jax.make_jaxpr(causal_conv1d)(u, jnp.ones((taps, width)), d)
    assert operations(conv.jaxpr) == (0, length * 2 * taps * width)
    layer = forward_flops(mamba(8, 1, d_state=states, expand=1), length)
    assert layer.recurrence == 8 * (7 * states + 3 + 2 * 4)


@pytest.mark.parametrize("name", ["mistral-7b", "phi-3-mini", "phi-4"])
def test_palm_formula_and_six_n(name: str) -> None:
    # arXiv 2204.02311, appendix B: 6 N + 12 L H Q T per token, N without embedding and norms.
    config = preset(name)
    mixer = config.pattern[0].mixer
    assert isinstance(mixer, AttentionConfig)
    norms = (2 * config.n_layers + 1) * config.d_model
    n = summary(config).non_embedding + config.vocab_size * config.d_model - norms
    attention = 12 * config.n_layers * mixer.n_heads * mixer.head_dim * 2048
    flops = training_flops(config, 2048, "none", causal=False)
    assert flops == 6 * n + attention
    # 6 N alone (arXiv 2001.08361) leaves out attention: 2 % at 512 tokens and these widths.
    assert training_flops(config, 512, "none") == pytest.approx(6 * n, rel=0.02)


def test_six_n_of_a_sparse_model_is_of_its_active_parameters() -> None:
    config = preset("mixtral-8x7b")
    active = summary(config).active - config.vocab_size * config.d_model
    assert training_flops(config, 512, "none") == pytest.approx(6 * active, rel=0.01)


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="seq_len=0 must be at least 1"):
        forward_flops(preset("tiny-dense"), 0)
    with pytest.raises(UserError, match="remat='some' is not known: choose none, full, dots"):
        training_flops(preset("tiny-dense"), 8, "some")  # type: ignore[arg-type]


# Kinds and TensorCores of a device: v4 and v5p have megacore, which can be off.
TPU_DEVICES = [
    (kind, cores)
    for kind, chip in PEAK_FLOPS.items()
    if kind.startswith("TPU")
    for cores in range(1, 2 if kind == "TPU7x" else chip.cores + 1)
]


@pytest.mark.parametrize(("kind", "cores"), TPU_DEVICES)
def test_tpu_peaks_agree_with_jax(kind: str, cores: int) -> None:
    chip = PEAK_FLOPS[kind]
    device = AbstractDevice(kind, cores, "tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        info = pltpu.get_tpu_info()
    assert peak_flops(device) == pytest.approx(cores * info.bf16_ops_per_second, rel=0.005)
    # jax rounds, and gives v5p 11 % less than Google's page does.
    hbm = chip.hbm * cores / chip.cores
    assert hbm == pytest.approx(cores * info.mem_bw_bytes_per_second, rel=0.13)


def test_peak_is_of_one_device_and_never_guessed() -> None:
    assert peak_flops(AbstractDevice("TPU v5p", 2, "tpu")) == 459e12
    assert peak_flops(AbstractDevice("TPU7x", 1, "tpu")) == 2307e12 / 2
    assert peak_flops(AbstractDevice("NVIDIA H200", None, "cuda")) == 989e12
    assert peak_flops(AbstractDevice("NVIDIA H100 PCIe", None, "cuda")) is None
    assert peak_flops(jax.devices("cpu")[0]) is None
