"""Golden files by the `gguf` package: bytes of every encoding, and a file of every kind of value.

    .peers-env/bin/python tests/export/peer_package.py

Needs numpy and gguf only. Nothing of slm_jax is imported: what is written is the package's opinion.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

OUT = Path(__file__).parent / "golden"


def values() -> np.ndarray:
    """Blocks of 32 that are hard to round: zeros, ties, one outlier, the tiniest and large."""
    draw = np.random.RandomState(0).standard_normal
    rows = draw((12, 64)) * np.logspace(-6, 3, 12)[:, None]
    rows[0] = 0
    rows[1, :32] = np.r_[127, np.arange(31) - 14.5]  # ties: the scale is 1
    rows[1, 32:] = np.linspace(-127, 127, 32)
    rows[2, 5] = 1000
    rows[3] = draw(64) * 1e-7  # the scale underflows to a float16 subnormal
    rows[4] = -rows[5]
    rows[5, 1:] = 0
    return rows.astype(np.float32)


def write_blocks() -> None:
    """For each type the bytes that the package stores, and what it reads back from them."""
    rows = values()
    out = {"values": rows}
    for kind in (Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1):
        raw = gguf.quants.quantize(rows, kind)
        out[f"{kind.name}_bytes"] = raw.view(np.uint8)
        out[f"{kind.name}_values"] = gguf.quants.dequantize(raw, kind)
    np.savez_compressed(OUT / "blocks.npz", **out)


def write_file() -> None:
    """A file with metadata of every type and tensors of one to three dimensions."""
    path = OUT / "types.gguf"
    w = gguf.GGUFWriter(path, "none")
    w.add_uint8("u8", 255)
    w.add_int8("i8", -128)
    w.add_uint16("u16", 65535)
    w.add_int16("i16", -32768)
    w.add_uint32("u32", 2**32 - 1)
    w.add_int32("i32", -(2**31))
    w.add_float32("f32", 1e-5)
    w.add_uint64("u64", 2**64 - 1)
    w.add_int64("i64", -(2**63))
    w.add_float64("f64", 1e-300)
    w.add_bool("yes", True)
    w.add_bool("no", False)
    w.add_string("text", "Grüße, 世界 🌍")
    w.add_array("texts", ["a", "", "ééé"])
    w.add_array("ints", [1, -2, 3])
    w.add_array("floats", [0.5, -1.5])
    w.add_array("bools", [True, False, True])
    w.add_tensor("vector", np.arange(5, dtype=np.float32))
    w.add_tensor("matrix", np.arange(6, dtype=np.float16).reshape(2, 3))
    cube = np.linspace(-1, 1, 2 * 3 * 64, dtype=np.float32).reshape(2, 3, 64)
    w.add_tensor("cube", gguf.quants.quantize(cube, Type.Q8_0), raw_dtype=Type.Q8_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    reader = gguf.GGUFReader(path)
    seen = {
        "types": {k: f.types[-1].name for k, f in reader.fields.items() if k[:5] != "GGUF."},
        "values": {k: f.contents() for k, f in reader.fields.items() if k[:5] != "GGUF."},
        "tensors": {
            t.name: gguf.quants.dequantize(np.asarray(t.data), t.tensor_type).tolist()
            for t in reader.tensors
        },
    }
    (OUT / "types.json").write_text(json.dumps(seen, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    write_blocks()
    write_file()
