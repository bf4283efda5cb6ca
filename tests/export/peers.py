"""Runs the programs that did not come from here on files that did.

    .venv/bin/python -m tests.export.peers [PEER...]

writes golden/peers.npz (logits) and golden/peers.json (which file, and who read it). Peers that are
not named keep what they said before, if the file is still the same.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from slm_jax.data import ByteTokenizer
from slm_jax.export.gguf import save_gguf
from tests.export.cases import CASES, PROMPT, make

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "golden"
PYTHONS = {
    "transformers": ("SLM_GOLDEN_PYTHON", ".golden-env", "golden-env"),
    "llama_cpp": ("SLM_PEERS_PYTHON", ".peers-env", "peers"),
}
READABLE = {
    # Its reader of GGUF knows neither biases nor scaled rope.
    "transformers": ("dense", "adjacent", "moe", "qwen2", "qwen3", "mamba"),
    "llama_cpp": tuple(CASES),
}


def export_all(folder: Path, **options) -> list[Path]:
    """Every case as a file, and the prompt's ids in tokens.npy."""
    np.save(folder / "tokens.npy", ByteTokenizer().encode(PROMPT))
    paths = [folder / f"{name}.gguf" for name in CASES]
    for path in paths:
        save_gguf(make(path.stem), path, tokenizer=ByteTokenizer(), **options)
    return paths


def ask(peer: str, folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What a peer computes with the files of `export_all`."""
    variable, environment, target = PYTHONS[peer]
    python = Path(os.environ.get(variable, ROOT / environment / "bin" / "python"))
    assert python.is_file(), f"{python} is missing: run `make {target}`"
    script = {"transformers": "peer_transformers.py", "llama_cpp": "peer_llama.py"}[peer]
    text = [PROMPT] if peer == "llama_cpp" else []
    files = [str(folder / f"{name}.gguf") for name in names]
    out = folder / f"{peer}.npz"
    command = [python, Path(__file__).parent / script, folder / "tokens.npy", *text, out, *files]
    kept = ("PATH", "HOME", "PYTHONPATH")
    environ = {key: os.environ[key] for key in kept if key in os.environ}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(out) as found:
        return dict(found)


def main(peers: list[str]) -> None:
    """Asks the peers and writes their answers."""
    said: dict[str, dict] = {}
    arrays: dict[str, np.ndarray] = {}
    if (GOLDEN / "peers.json").exists():
        said = json.loads((GOLDEN / "peers.json").read_text())
        arrays = dict(np.load(GOLDEN / "peers.npz"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hashes = {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in export_all(folder)}
        said = {case: facts for case, facts in said.items() if facts["sha256"] == hashes.get(case)}
        for peer in peers:
            found = ask(peer, folder, READABLE[peer])
            for case in READABLE[peer]:
                facts = said.setdefault(case, {"sha256": hashes[case], "peers": []})
                facts["peers"] = sorted({*facts["peers"], peer})
            arrays |= {f"{peer}-{key}": value for key, value in found.items()}
    wanted = tuple(f"{peer}-{case}" for case, facts in said.items() for peer in facts["peers"])
    kept = {k: v for k, v in arrays.items() if k.startswith(wanted)}
    np.savez_compressed(GOLDEN / "peers.npz", **kept)
    (GOLDEN / "peers.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(PYTHONS))
