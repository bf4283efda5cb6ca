"""Scales, rounding and packing, against NumPy and published values."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.compress.codes import (
    Coded,
    decode,
    encode,
    nf4_levels,
    pack,
    round_tokens,
    unpack,
    values_of,
    zero_code,
)
from slm_jax.compress.spec import QuantSpec, parse_spec
from slm_jax.errors import UserError

RNG = np.random.default_rng(0)

# bitsandbytes/functional.py, get_4bit_type("nf4"), and table 5 of arXiv 2305.14314, appendix E.
BITSANDBYTES_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@partial(jax.jit, static_argnames="spec")
def stored_and_read(w: jax.Array, spec: QuantSpec) -> tuple[Coded, jax.Array]:
    coded = encode(w, spec)
    return coded, decode(coded, spec, w.shape[-1])


def test_nf4_levels_are_those_of_bitsandbytes() -> None:
    np.testing.assert_allclose(nf4_levels(), BITSANDBYTES_NF4, atol=1e-7)
    assert nf4_levels()[7] == 0  # zero is exact


def numpy_rtn(w: np.ndarray, top: int, group: int, scale_dtype) -> np.ndarray:
    """Round to nearest, group by group, in float64 but for the stored scale."""
    out = np.zeros(w.shape)
    for row in np.ndindex(w.shape[:-1]):
        for start in range(0, w.shape[-1], group):
            part = np.float64(w[row][start : start + group])
            scale = np.float64(scale_dtype(np.float32(np.abs(part).max()) / np.float32(top)))
            codes = np.rint(part / scale) if scale else 0 * part
            out[row][start : start + group] = np.clip(codes, -top, top) * scale
    return out


@pytest.mark.parametrize(
    ("name", "n_in", "top", "group"),
    [
        ("w8", 12, 127, 12),
        ("w8g4", 10, 127, 4),
        ("w4", 7, 7, 7),  # an odd number of codes in bytes of two
        ("w4g4", 12, 7, 4),
        ("w4g4", 11, 7, 4),  # the last group is smaller
        ("w4g32", 11, 7, 11),  # a group larger than the row
        ("w4g5", 13, 7, 5),  # groups that begin in the middle of a byte
        ("w3", 11, 3, 11),  # eight codes in three bytes, and three codes in three more
        ("w3g4", 16, 3, 4),
        ("w3g5", 13, 3, 5),
    ],
)
def test_integers_are_numpys(name: str, n_in: int, top: int, group: int) -> None:
    spec = parse_spec(name)
    w = RNG.normal(size=(2, 3, n_in)).astype(np.float32)
    w[0, 1] = 0
    coded, got = stored_and_read(w, spec)
    stored = jnp.bfloat16.dtype.type if spec.group else np.float32
    np.testing.assert_allclose(got, numpy_rtn(w, top, group, stored), rtol=1e-6, atol=0)
    columns = {8: n_in, 4: -(-n_in // 2), 3: 3 * -(-n_in // 8)}[spec.bits]
    assert coded.codes.shape == (2, 3, columns)
    assert coded.codes.dtype == (jnp.int8 if spec.bits == 8 else jnp.uint8)
    assert coded.scales.shape == (2, 3, -(-n_in // group))


def test_nf4_takes_the_nearest_level_of_each_group() -> None:
    spec = parse_spec("nf4g4")
    w = RNG.normal(size=(5, 10)).astype(np.float32)
    _, got = stored_and_read(w, spec)
    for row, out in zip(w, np.asarray(got), strict=True):
        for start in range(0, 10, 4):
            part = row[start : start + 4]
            scale = np.float32(jnp.bfloat16.dtype.type(np.abs(part).max()))
            levels = np.array(BITSANDBYTES_NF4) * scale
            want = levels[np.abs(part[:, None] - levels).argmin(axis=1)]
            np.testing.assert_allclose(out[start : start + 4], want, rtol=1e-6)


@pytest.mark.parametrize("name", ["w8", "w4g3", "w3g3", "nf4g3"])
def test_zeros_stay_zeros_whatever_is_beside_them(name: str) -> None:
    spec = parse_spec(name)
    w = np.zeros((3, 6), np.float32)
    w[0, 4], w[1] = 2.5, 1e-30
    got = np.asarray(stored_and_read(w, spec)[1])
    np.testing.assert_allclose(got, w, rtol=4e-3)  # bfloat16 scales
    assert np.isfinite(got).all()


LOWEST = {"w8": -127, "w4": -8, "w3": -4, "nf4": 0}


@partial(jax.jit, static_argnames="spec")
def packed_and_unpacked(codes: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """With what fills up the last bytes."""
    stored = pack(codes, spec)
    return stored, unpack(stored, spec, stored.shape[-1] * 8 // spec.bits)


@hypothesis.given(
    st.sampled_from(sorted(LOWEST)),
    st.sampled_from([1, 7, 8, 11]).flatmap(
        lambda n: st.lists(st.integers(0, 254), min_size=2 * n, max_size=2 * n)
    ),
)
def test_packing_is_undone_exactly(name: str, numbers: list[int]) -> None:
    spec = parse_spec(name)
    codes = LOWEST[name] + np.array(numbers).reshape(2, -1) % min(2**spec.bits, 255)
    stored, back = packed_and_unpacked(codes.astype(np.int8), spec)
    n = codes.shape[1]
    np.testing.assert_array_equal(back[:, :n], codes)
    assert stored.nbytes == 2 * {8: n, 4: -(-n // 2), 3: 3 * -(-n // 8)}[spec.bits]
    assert np.all(np.asarray(back)[:, n:] == zero_code(spec))
    assert values_of(jnp.int8(zero_code(spec)), spec) == 0


def test_three_bit_codes_lie_in_a_little_endian_number() -> None:
    codes = np.array([-3, -2, -1, 0, 1, 2, 3, -4, 3], np.int8)
    packed = np.asarray(pack(jnp.asarray(codes[None]), parse_spec("w3")))[0]
    bits = np.unpackbits(packed, bitorder="little").reshape(-1, 3)
    np.testing.assert_array_equal(bits @ [1, 2, 4], [*(codes + 4), *[4] * 7])


def test_four_bit_codes_lie_low_half_first() -> None:
    packed = pack(jnp.asarray([[-7, 7, 0]], jnp.int8), parse_spec("w4"))
    np.testing.assert_array_equal(packed, [[0x1 | 0xF << 4, 0x8 | 0x8 << 4]])


def test_tokens_are_rounded_each_by_its_own_largest() -> None:
    x = RNG.normal(size=(6, 32)).astype(np.float32) * np.float32([[1], [1e-3], [50], [1], [0], [1]])
    codes, scales = (np.asarray(a) for a in jax.jit(round_tokens)(x))
    want = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    np.testing.assert_allclose(scales, want, rtol=2e-7)
    rows = want[:, 0] > 0
    np.testing.assert_array_equal(codes[rows], np.rint(x[rows] / scales[rows]))
    np.testing.assert_array_equal(codes[4], 0)
    assert codes.dtype == jnp.int8


@pytest.mark.parametrize(
    "name", ["w8", "w4", "w3", "nf4", "w8a8", "w4a8", "w3a8", "w8g32", "w4g128", "w3g32", "nf4g64"]
)
def test_names_are_read_and_written(name: str) -> None:
    assert parse_spec(name).name == name


@pytest.mark.parametrize("name", ["", "w5", "w8a4", "a8", "w4g", "w4 g32", "nf8", "w8a8a8"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no format: give w8, w4, w3 or nf4"):
        parse_spec(name)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="choose w8a8, w4a8 or w3a8"):
        parse_spec("w8a8g32")
    with pytest.raises(UserError, match="choose w8a8, w4a8 or w3a8"):
        parse_spec("nf4a8")
    with pytest.raises(UserError, match="group=1 must be at least 2"):
        QuantSpec("int4", 1)
