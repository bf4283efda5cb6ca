"""Drafted tokens change neither what is drawn nor, when greedy, a single token."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from slm_jax.errors import UserError
from slm_jax.infer import Sampling, generate, speculate
from slm_jax.infer.sampling import probabilities
from slm_jax.models.lm import LM
from tests.nn.tiny import randomised, tiny_config, tokens

KEY = jax.random.key(0)
NEW = 12
PROMPTS = [tokens(1, n, seed=n)[0] for n in (3, 20, 9)]


@cache
def lm(name: str, seed: int = 0, **changes: int) -> LM:
    config = tiny_config(name, **changes)
    return randomised(jax.eval_shape(lambda key: LM(config, key), KEY), seed)


def near(model: LM, share: float = 0.1) -> LM:
    """A draft that often agrees: the model with its weights moved a little."""
    noise = randomised(model, seed=7)
    return jax.tree.map(lambda a, b: (1 - share) * a + share * b, model, noise)


def joined(turns: list, rows: int) -> list[list[int]]:
    steps = np.concatenate([turn.tokens for turn in turns], axis=1)
    return [steps[i][steps[i] >= 0].tolist() for i in range(rows)]


@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        ("window", 1.3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("window", 1.0), ("moe", 1.0))),
    ],
)
def test_greedy_tokens_are_those_of_the_model(name: str, penalty: float) -> None:
    """A window of 5 and 3 drafted tokens: rejected ones may not push out what is still seen."""
    options = dict(sampling=Sampling(0, repetition_penalty=penalty), max_new_tokens=NEW, key=KEY)
    want = [row.tolist() for row in generate(lm(name), PROMPTS, **options)]
    turns = list(speculate(lm(name), near(lm(name)), PROMPTS, n_draft=3, **options))
    assert joined(turns, 3) == want
    drafted, accepted = (sum(getattr(t, f) for t in turns) for f in ("drafted", "accepted"))
    assert 0.1 < accepted / drafted < 0.95  # both happened
    # A row alone, and an end in the middle of a pass.
    eos = want[1][5]
    cut = want[1][: want[1].index(eos) + 1]
    turns = list(
        speculate(lm(name), near(lm(name)), PROMPTS[1:2], n_draft=3, eos_id=eos, **options)
    )
    assert joined(turns, 1) == [cut]


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    turns = list(
        speculate(
            lm("window"), lm("window"), PROMPTS, max_new_tokens=9, n_draft=3, key=KEY,
            sampling=Sampling(0.8),
        )
    )  # fmt: skip
    assert [t.accepted for t in turns] == [t.drafted for t in turns] == [0, 9, 9]
    assert [len(row) for row in joined(turns, 3)] == [9, 9, 9]


@partial(jax.jit, static_argnames="sampling")
def _joint(model: LM, prompt: jax.Array, sampling: Sampling) -> jax.Array:
    """Probabilities of all continuations by three tokens, `[V, V, V]`, by full forward passes."""
    v = model.config.vocab_size
    two = jnp.stack(jnp.meshgrid(jnp.arange(v), jnp.arange(v), indexing="ij"), -1).reshape(-1, 2)
    rows = jnp.concatenate([jnp.tile(prompt, (v * v, 1)), two], axis=1)
    p = probabilities(model(rows)[0][:, -3:], sampling).reshape(v, v, 3, v)
    return p[:1, :1, 0, :].reshape(v, 1, 1) * p[:, :1, 1, :].reshape(v, v, 1) * p[:, :, 2, :]


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(1.0), id="plain", marks=pytest.mark.slow),
        pytest.param(Sampling(0.7, top_k=4, top_p=0.95), id="filtered"),
    ],
)
def test_what_is_drawn_has_the_distribution_of_the_model(sampling: Sampling) -> None:
    """Three tokens of six in 4,096 rows, against the exact joint distribution."""
    model, draft = (lm("dense", seed, vocab_size=6, n_layers=1) for seed in (0, 1))
    prompt, n = np.array([1, 5, 2]), 4096
    turns = list(
        speculate(
            model, draft, [prompt] * n, max_new_tokens=3, n_draft=2, key=KEY, sampling=sampling
        )
    )
    drawn = np.array(joined(turns, n))
    counts = np.bincount(np.ravel_multi_index(drawn.T, (6, 6, 6)), minlength=216)

    def p_value(p: np.ndarray) -> float:
        """Of the counts; cells that expect less than 5 are one."""
        expected = n * p.ravel().astype(float)
        few = expected < 5
        f_obs = np.append(counts[~few], counts[few].sum())
        f_exp = np.append(expected[~few], expected[few].sum())
        return chisquare(f_obs[f_exp > 0], f_exp[f_exp > 0] * f_obs.sum() / f_exp.sum()).pvalue

    exact = np.asarray(_joint(model, prompt, sampling))
    np.testing.assert_allclose(exact.sum(), 1, rtol=1e-5)
    assert not counts[exact.ravel() == 0].any()
    assert p_value(exact) > 0.01
    assert p_value(np.asarray(_joint(draft, prompt, sampling)) + 1e-3) < 1e-9  # the test can tell
    rate = sum(t.accepted for t in turns) / sum(t.drafted for t in turns)
    assert 0.1 < rate < 0.95


@pytest.mark.parametrize(
    ("model", "draft", "message"),
    [
        ("mamba", "dense", "model: MambaConfig has a recurrent state"),
        ("dense", "hybrid", "draft: MambaConfig has a recurrent state"),
        ("moe_capacity", "dense", "model: dispatch='capacity' drops other tokens"),
    ],
)
def test_what_cannot_take_tokens_back_is_refused(model: str, draft: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        speculate(lm(model), lm(draft), PROMPTS, max_new_tokens=1, key=KEY)


def test_vocabularies_must_agree() -> None:
    with pytest.raises(UserError, match="draft: vocab_size=6, the model's is 48"):
        speculate(lm("dense"), lm("dense", vocab_size=6), PROMPTS, max_new_tokens=1, key=KEY)
    with pytest.raises(UserError, match="n_draft=0 must be at least 1"):
        speculate(lm("dense"), lm("dense"), PROMPTS, max_new_tokens=1, key=KEY, n_draft=0)
