"""Encodings against the `gguf` package: golden/blocks.npz is its opinion."""

from pathlib import Path

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.export.gguf.blocks import BF16, ENCODINGS, F16, F32, Q8_0, Encoding, decode, encode

GOLDEN = np.load(Path(__file__).parent / "golden" / "blocks.npz")
VALUES = GOLDEN["values"]
BY_NAME = {encoding.name: encoding for encoding in ENCODINGS.values()}


@pytest.mark.parametrize("encoding", [F16, BF16, Q8_0], ids=lambda e: e.name)
def test_bytes_are_those_of_the_package(encoding: Encoding) -> None:
    with np.errstate(all="raise", under="ignore"):
        raw = encode(encoding, VALUES, "x")
    assert raw.dtype == np.uint8
    assert raw.size == encoding.size(VALUES.shape)
    np.testing.assert_array_equal(raw, GOLDEN[f"{encoding.name}_bytes"].reshape(-1))


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_values_are_those_of_the_package(name: str) -> None:
    values = decode(BY_NAME[name], GOLDEN[f"{name}_bytes"].reshape(-1))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, GOLDEN[f"{name}_values"].reshape(-1))


def test_float32_comes_back() -> None:
    np.testing.assert_array_equal(decode(F32, encode(F32, VALUES, "x")), VALUES.reshape(-1))


def test_eight_bits_are_within_half_a_step_and_stay_as_they_are() -> None:
    x = np.random.RandomState(1).standard_normal((40, 96)).astype(np.float32)
    raw = encode(Q8_0, x, "x")
    back = decode(Q8_0, raw).reshape(x.shape)
    step = np.abs(x.reshape(40, 3, 32)).max(-1, keepdims=True) / 127
    # Half a step, and the float16 rounding of the scale (2^-11) times up to 127 of them.
    bound = step * (0.5 + 127 * 2.0**-11) * 1.001
    assert (np.abs(back - x).reshape(40, 3, 32) <= bound).all()
    np.testing.assert_array_equal(encode(Q8_0, back, "x"), raw)


def test_the_tiniest_numbers_become_zero_without_a_warning() -> None:
    x = np.full((1, 32), 1e-44, np.float32)
    x[0, 3] = 0
    with np.errstate(all="raise", under="ignore"):
        assert not decode(Q8_0, encode(Q8_0, x, "x")).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", [F32, F16, Q8_0], ids=lambda e: e.name)
def test_numbers_that_are_not_finite_are_refused(encoding: Encoding, bad: float) -> None:
    x = np.zeros((2, 32), np.float32)
    x[1, 7] = bad
    with pytest.raises(UserError, match=r"layer\.w holds NaN or infinity"):
        encode(encoding, x, "layer.w")


@pytest.mark.parametrize(("encoding", "large"), [(F16, 7e4), (Q8_0, 9e6)])
def test_numbers_too_large_for_float16_are_refused(encoding: Encoding, large: float) -> None:
    x = np.full((1, 32), large, np.float32)
    with pytest.raises(UserError, match=f"holds .*, more than {encoding.name} can"):
        encode(encoding, x, "x")
    encode(encoding, x / 2, "x")
