"""Logits, gradients and causality of every golden case against `transformers`."""

import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from slm_jax.models.hf import load_hf, tensor_map, to_hf
from slm_jax.models.lm import LM
from slm_jax.models.loss import cross_entropy
from slm_jax.nn.attention import AttentionConfig
from tests.golden.cases import CASES, LENGTH, VARIANTS
from tests.models.hf_golden import GOLDEN, Case, assert_close, full, opened, quick_jit


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with opened(request.param) as case:
        yield case


@quick_jit
def gradient(
    model: LM, tokens: jax.Array, ce_weight: jax.Array, direction: jax.Array
) -> tuple[LM, jax.Array]:
    """Gradient of ce_weight x mean next-token CE + direction . hidden, and the logits."""

    def objective(model: LM) -> tuple[jax.Array, jax.Array]:
        x, _, _ = model.hidden(tokens)
        logits = model.logits(x)
        ce = jnp.mean(cross_entropy(logits[:, :-1], tokens[:, 1:]))
        return ce_weight * ce + jnp.sum(x * direction), logits

    return jax.grad(objective, has_aux=True)(model)


def ce_gradient(model: LM, tokens: np.ndarray) -> tuple[LM, jax.Array]:
    return gradient(model, tokens, 1.0, np.zeros((*tokens.shape, model.config.d_model), np.float32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(case: Case, variant: str) -> None:
    golden = case.golden[variant]
    _, logits = ce_gradient(case.models[variant], golden["tokens"])
    assert_close(logits, golden["logits"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padding_changes_nothing(case: Case, variant: str) -> None:
    golden = case.golden[variant]
    mask = golden["padded_mask"]
    logits = full(case.models[variant], golden["padded_tokens"], mask)
    real = mask == 1
    assert_close(np.asarray(logits)[real], golden["padded_logits"][real])


def test_gradients(case: Case) -> None:
    golden = case.golden["reinit"]
    grads, _ = ce_gradient(case.models["reinit"], golden["tokens"])
    config = json.loads((GOLDEN / f"{case.name}-reinit" / "config.json").read_text())
    ours = to_hf(grads, tensor_map(grads, config["model_type"]))
    wanted = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    assert set(wanted) == set(CASES[case.name].grads)
    for name, want in wanted.items():
        error = np.abs(ours[name] - want).max()
        assert error <= 2e-5 * np.abs(want).max(), name


def test_no_gradient_from_the_future(case: Case) -> None:
    """d hidden[t] / d embedding of later tokens, and of another row's, is exactly zero."""
    model = case.models["reinit"]
    tokens = np.stack([np.arange(LENGTH), np.full(LENGTH, LENGTH)]).astype(np.int32)
    direction = np.random.default_rng(0).standard_normal(model.config.d_model)
    layers = [model.config.layer(i).mixer for i in range(model.config.n_layers)]
    windows = [m.window if isinstance(m, AttentionConfig) else None for m in layers]
    reach = LENGTH if None in windows else sum(w - 1 for w in windows if w is not None)
    for t in (0, 7, LENGTH - 2):
        where = np.zeros((*tokens.shape, model.config.d_model), np.float32)
        where[0, t] = direction
        grads, _ = gradient(model, tokens, 0.0, where)
        rows = np.abs(np.asarray(grads.embed.w[...])).max(axis=-1)
        first = max(0, t - reach)
        assert (rows[first : t + 1] > 0).all()
        assert not rows[t + 1 :].any()
        assert not rows[:first].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_rope_switches_its_factors(variant: str) -> None:
    folder = GOLDEN / f"phi3-longrope-{variant}"
    golden = load_file(folder / "golden.safetensors")
    tokens = golden["tokens_long"]
    with jax.default_matmul_precision("highest"):
        logits = full(load_hf(folder), tokens, np.ones_like(tokens))
    assert_close(logits, golden["logits_long"])
