"""What the README tells a reader to do is done here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    """The fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def execute(args: list[str], folder: Path, path: Path = ROOT) -> str:
    """Runs Python in `folder` on the sources in `path`."""
    python_path = os.pathsep.join([str(path), str(path / "kernels")])
    done = subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": python_path, "SLM_JAX_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_first_experiment_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
    out = execute(["-c", code], tmp_path)
    scores = dict(re.findall(r"^(\w+): ([\d.]+) bits a byte", out, re.M))
    assert set(scores) == {"attention", "scan"}
    assert all(2 < float(v) < 6 for v in scores.values())


def test_the_diff_applies(tmp_path: Path) -> None:
    apply_diff(tmp_path)
    assert "MinGRUConfig: MinGRU" in (tmp_path / "slm_jax/nn/block.py").read_text()


@pytest.mark.slow
def test_the_added_architecture_trains_decodes_and_is_counted(tmp_path: Path) -> None:
    apply_diff(tmp_path)
    args = "--architectures mingru --width 32 --layers 2 --steps 8 --warmup-steps 1 --seeds 1"
    args += " --learning-rates 1e-2 --batch-size 8 --seq-len 32 --out runs/mingru"
    script = str(tmp_path / "experiments" / "ablate_architectures.py")
    execute([script, *args.split()], tmp_path, tmp_path)
    run = next((tmp_path / "runs" / "mingru" / "mingru").iterdir())
    check = f"""
import jax, jax.numpy as jnp
from pathlib import Path
from slm_jax.train.experiment import load_model
model, _ = load_model(Path({str(run)!r}))
tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 257)
whole = model(tokens)[0]
state, steps = model.init_state(2, 12), []
for t in range(12):
    logits, _, state = model(tokens[:, t:t+1], positions=jnp.full((2, 1), t), state=state)
    steps.append(logits)
print(float(jnp.max(jnp.abs(whole - jnp.concatenate(steps, 1)))))
"""
    assert float(execute(["-c", check], tmp_path, tmp_path)) < 1e-4


def apply_diff(folder: Path) -> None:
    """Copies the sources and applies the README's diff to the copy."""
    for name in ("slm_jax", "kernels", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (diff,) = blocks("diff")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
