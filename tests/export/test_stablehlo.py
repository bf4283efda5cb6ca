"""Programs for other machines: run in a process of their own, to which our packages are closed."""

import hashlib
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from slm_kernels.aot import find_libtpu
from slm_kernels.aot.compile import child_environment

from slm_jax.compress import parse_spec, quantise
from slm_jax.data import ByteTokenizer
from slm_jax.errors import UserError
from slm_jax.export.stablehlo import export_programs, save_stablehlo
from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.presets import hybrid
from slm_jax.models.recursion import RecursionConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import MambaConfig
from tests.export.cases import CASES, VOCAB, WIDTH, filled, logits
from tests.export.integer_dots import Dot, compiled, dots_in

ROOT = Path(__file__).parents[2]
NEW, LENGTH = 4, 160
PROMPTS = [[7, 3, 250, 11, 11, 90, 4], list(range(5, 26)), [256]]
# Read in two calls of prefill; the second row is padding in the first of them.
LONG = [np.random.RandomState(0).randint(0, VOCAB, 130).tolist(), [1, 2, 3], [9]]

_ATTENTION, _MLP = AttentionConfig(4, 2, 16), MLPConfig(96)
_WINDOW = LayerConfig(replace(_ATTENTION, window=20), _MLP)
_CAPACITY = MoEConfig(4, 96, dispatch="capacity", capacity_factor=4.0)
CONFIGS: dict[str, LMConfig] = {
    "dense": CASES["dense"],
    "moe": CASES["moe"],
    "mamba": CASES["mamba"],
    "hybrid": hybrid(WIDTH, 4, 4, 2, 96, attention_period=2, attention_offset=1, n_experts=4),
    "window": replace(CASES["dense"], pattern=(_WINDOW,)),
    "capacity": replace(CASES["moe"], pattern=(LayerConfig(_ATTENTION, _CAPACITY),)),
    "recursion": replace(CASES["dense"], recursion=RecursionConfig(0, 1, repeats=3)),
    # All that the others have, in two layers.
    "mixed": replace(
        CASES["dense"],
        pattern=(_WINDOW, LayerConfig(MambaConfig(2 * WIDTH, d_state=8), MoEConfig(4, 96))),
        tie_embeddings=False,
    ),
}
DAILY = ["dense", "mixed:w8a8"]
SLOW = ["moe", "mamba", "hybrid", "window", "capacity", "recursion", "dense:w8", "dense:w8a8"]
SLOW += ["dense:w4g32", "moe:w8a8", "mamba:w8a8", "recursion:w8a8"]

# In the child nothing of the project can be imported, nor what the project is made with.
CHILD = """
import sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("slm_jax", "slm_kernels", "flax", "safetensors", "tests"):
            raise ImportError("closed: " + name)
sys.meta_path.insert(0, Closed())
import importlib.util, json, pathlib
import numpy as np
for folder in map(pathlib.Path, sys.argv[2:]):
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    model = run.Model(folder)
    for i, (prompts, new) in enumerate(json.loads(sys.argv[1])):
        ids, logits = model.generate(prompts, new)
        np.savez(folder / f"out{i}.npz", ids=ids, logits=logits)
"""


def build(name: str) -> LM:
    base, _, spec = name.partition(":")
    model = filled(CONFIGS[base], seed=len(base))
    return quantise(model, parse_spec(spec)) if spec else model


def run_apart(top: Path, names: Sequence[str], work: list) -> dict[str, Path]:
    """Exports the models and has another process run `work`: prompts and how many new tokens."""
    out = {name: top / name.replace(":", "-") for name in names}
    for name, folder in out.items():
        save_stablehlo(build(name), folder, config={"name": name}, tokenizer=ByteTokenizer())
    command = [sys.executable, "-c", CHILD, json.dumps(work), *map(str, out.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def check(name: str, folder: Path, work: list) -> None:
    """Holds what the other process wrote against full forward passes of ours."""
    model = build(name)
    for i, (prompts, new) in enumerate(work):
        with np.load(folder / f"out{i}.npz") as out:
            ids, found = out["ids"], out["logits"]
        np.testing.assert_array_equal(ids, found.argmax(-1))
        assert found.shape == (len(prompts), new, VOCAB)
        for row, prompt in enumerate(prompts):
            text = [*prompt, *ids[row, :-1]]
            padded = np.zeros(LENGTH, np.int32)  # one program for all; no token sees a later one
            padded[: len(text)] = text
            want = logits(model, padded)[len(prompt) - 1 : len(text)]
            np.testing.assert_allclose(found[row], want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_another_process_has_our_logits(tmp_path: Path) -> None:
    work = [(PROMPTS, NEW)]
    for name, folder in run_apart(tmp_path, DAILY, work).items():
        check(name, folder, work)


@pytest.mark.slow
def test_every_architecture_and_format_runs_elsewhere(tmp_path: Path) -> None:
    work = [(PROMPTS, NEW), (LONG, 2)]
    for name, folder in run_apart(tmp_path, [*SLOW, *DAILY], work).items():
        check(name, folder, work)


def _tokens(program: Any) -> str:
    args, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    return args[1].str_short()


def test_lengths_are_symbols_unless_a_layer_must_know_them() -> None:
    free = export_programs(build("mixed:w8a8"))
    assert (free.multiple, free.most, free.least_room) == (16, 16, 128)  # a window of 20
    assert _tokens(free.prefill) == "int32[b,16*n]"
    assert _tokens(free.decode) == "int32[b,1]"
    fixed = export_programs(build("capacity"))
    assert (fixed.multiple, fixed.most) == (64, 64)
    assert _tokens(fixed.prefill) == "int32[b,64]"
    assert fixed.prefill.platforms == ("cpu", "cuda", "tpu")


def assert_integer(dots: list[Dot], others: int) -> None:
    """q, k, v, out, up, gate, down of a scanned layer, and the head, are products of int8."""
    integer = [dot for dot in dots if dot.result == "s32"]
    assert len(integer) == 8, dots
    assert {(dot.left, dot.right) for dot in integer} == {("s8", "s8")}, dots
    floats = [dot for dot in dots if dot.result != "s32"]
    assert not {"s8"} & {kind for dot in floats for kind in (dot.left, dot.right)}, dots
    assert len(floats) == others, dots


# Beside them attention's two products, the router's and that of the choice's weights.
@pytest.mark.parametrize(("name", "others"), [("dense:w8a8", 2), ("moe:w8a8", 4)])
def test_int8_products_are_of_integers_on_a_cpu(name: str, others: int) -> None:
    programs = export_programs(build(name))
    for program, length in ((programs.decode, 1), (programs.prefill, 16)):
        hlo = compiled(program, rows=1, length=length, room=programs.least_room)
        assert_integer(dots_in(hlo), others)


@pytest.mark.slow
def test_int8_products_are_of_integers_on_a_tpu(tmp_path: Path) -> None:
    try:
        find_libtpu()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    save_stablehlo(build("dense:w8a8"), tmp_path / "model", config={})
    for name, length in (("decode", 1), ("prefill", 16)):
        command = [sys.executable, "-m", "tests.export.integer_dots"]
        command += [str(tmp_path / "model" / f"{name}.stablehlo"), "32", str(length), "128"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=child_environment(), cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-3000:]
        print(dots_in(done.stdout))
        assert_integer(dots_in(done.stdout), 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hlo") / "model"
    save_stablehlo(build("dense:w8"), out, config={}, tokenizer=ByteTokenizer(), prefix=[256])
    return out


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def runner(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_of_folder", folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def change(folder: Path, **fields: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["arguments"]["decode"][:2] == ["int32[b,1]", "int32[b,1]"]
    assert manifest["arguments"]["prefill"][0] == "int32[b,16*n]"
    assert manifest["tensors"]["blocks.0.mixer.q.w.codes"] == ["I8", [2, 4, 16, WIDTH]]
    assert (manifest["eos_ids"], manifest["prefix"]) == ([256], [256])
    assert sorted(manifest["sha256"]) == sorted(
        p.name for p in folder.iterdir() if p.name not in ("manifest.json", "run.py")
    )
    model = runner(folder).Model(folder)
    assert model.weights["blocks.0.mixer.q.w.codes"].dtype == np.int8


@pytest.mark.parametrize("name", ["model.safetensors", "decode.stablehlo"])
def test_a_damaged_file_is_refused(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for data in (whole[:-1], bytes(flipped), pickle.dumps({"a": 1}), b""):
        (copy / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is not what the manifest"):
            runner(copy).Model(copy)
    (copy / name).unlink()
    with pytest.raises(OSError, match=name):
        runner(copy).Model(copy)


def test_only_files_of_the_folder_are_read(copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ("../secret", str(secret), "..", ".", "", "a/../../secret", "..\\secret", 3, None):
        sums = manifest["sha256"] | {str(name): digest(b"x")}
        change(copy, weights=name, sha256=sums)
        with pytest.raises(ValueError, match="no file of this folder"):
            runner(copy).Model(copy)


def test_other_weights_and_versions_are_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    file = copy / "model.safetensors"
    # Pickled, but with the right sum: no header, no tensors, and nothing is unpickled.
    for data in (pickle.dumps({"a": 1}), b"\xff" * 8, b"\2" + b"\0" * 7 + b"{}"):
        file.write_bytes(data)
        change(copy, sha256=manifest["sha256"] | {file.name: digest(data)})
        with pytest.raises(ValueError, match=r"not those of the manifest|Expecting value|decode"):
            runner(copy).Model(copy)
    change(copy, format="slm_jax stablehlo 2")
    with pytest.raises(ValueError, match="reads version 1"):
        runner(copy).Model(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        runner(copy).Model(copy)


def test_ids_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    model = runner(folder).Model(folder)
    for prompts, new in (([[VOCAB]], 1), ([[-1]], 1), ([[]], 1), ([[1]], 0)):
        with pytest.raises(ValueError, match=f"ids below {VOCAB}"):
            model.generate(prompts, new)


def test_a_folder_in_use_is_left_alone(copy: Path, tmp_path: Path) -> None:
    model = build("dense")
    with pytest.raises(UserError, match="holds exported programs"):
        save_stablehlo(model, copy, config={})
    save_stablehlo(model, copy, config={"is": "new"}, overwrite=True)
    assert json.loads((copy / "manifest.json").read_text())["model"] == {"is": "new"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        save_stablehlo(model, tmp_path / "mine", config={}, overwrite=True)


def test_a_failure_leaves_no_half_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_stablehlo(build("dense"), tmp_path / "out", config={"bad": object()})
    assert list(tmp_path.iterdir()) == []
