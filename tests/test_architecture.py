"""The rules of the tree: who may import whom, and what no committed file contains."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each part of the project may import of the project. A part is a folder of slm_jax, a file
# directly in it, or the kernels. `None`: anything. `_FREE` is open to all of slm_jax.
MAY_IMPORT: dict[str, set[str] | None] = {
    "slm_kernels": set(),
    "__init__": set(),
    "errors": set(),
    "exit_codes": set(),
    "parallel": set(),
    "data": set(),
    "scaling": set(),
    "nn": {"slm_kernels", "parallel"},
    "models": {"nn", "parallel"},
    "infer": {"models", "nn", "parallel"},
    "compress": {"models", "nn", "parallel", "slm_kernels"},
    "train": {"models", "data", "parallel", "nn", "scaling", "compress"},
    "slices": {"parallel", "slm_kernels"},
    "plan": {"train", "infer", "models", "parallel", "slices", "slm_kernels"},
    "launch": {"slices"},
    "export": {"models", "compress", "nn"},
    "evaluate": {"infer", "models", "data"},
    "cli": None,
    "__main__": None,
}
_FREE = ("errors", "exit_codes", "__init__", "__version__")
# Packages at the top of the repository; a project import begins with one of these names.
TOP = {"slm_jax", "slm_kernels", "experiments", "tests"}
# What slm_kernels may import besides the standard library: jax, and numpy which jax brings.
KERNELS_NEED = {"jax", "jaxlib", "numpy", "slm_kernels"}


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of every import in the source of `module`, wherever it stands."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"


def part_of(module: str) -> str:
    """The part of the project a dotted name lies in: `nn` for `slm_jax.nn.linear`."""
    names = module.split(".")
    if names[0] != "slm_jax":
        return names[0]
    return names[1] if len(names) > 1 else "__init__"


def import_violations(source: str, path: str) -> list[str]:
    """Says what breaks the import rule in `source`, the text of the file `path` (from the root)."""
    names = Path(path.removeprefix("kernels/")).with_suffix("").parts
    is_package = names[-1] == "__init__"
    module = ".".join(names[:-1] if is_package else names)
    part = part_of(module)
    if part not in MAY_IMPORT:
        return [f"{path}:1: `{part}` has no row in MAY_IMPORT (tests/test_architecture.py): add it"]
    allowed = MAY_IMPORT[part]
    if allowed is None:
        return []
    found = []
    for line, name in imported_modules(source, module, is_package):
        target = part_of(name)
        if part == "slm_kernels":
            bad = target not in KERNELS_NEED | sys.stdlib_module_names
        else:
            free = {part, *_FREE} | allowed
            bad = (name.split(".")[0] in TOP) and target not in free
        if bad:
            may = ", ".join(sorted(KERNELS_NEED if part == "slm_kernels" else allowed | {*_FREE}))
            found.append(f"{path}:{line}: `{part}` imports {name}; it may import only {may}")
    return found


def test_imports_point_down_the_table() -> None:
    files = [*ROOT.glob("slm_jax/**/*.py"), *ROOT.glob("kernels/slm_kernels/**/*.py")]
    assert files
    found = [
        violation
        for file in sorted(files)
        for violation in import_violations(file.read_text(), file.relative_to(ROOT).as_posix())
    ]
    assert not found, "imports against the table of the design:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("slm_jax/nn/x.py", "import slm_jax.models.lm"),
        ("slm_jax/nn/x.py", "def f():\n    from slm_jax import train"),
        ("slm_jax/nn/x.py", "from ..models import lm"),
        ("slm_jax/nn/__init__.py", "from ..models import lm"),
        ("slm_jax/data/x.py", "from slm_jax.models.lm import LM"),
        ("slm_jax/parallel/x.py", "from slm_jax.nn.module import named_leaves"),
        ("slm_jax/scaling/x.py", "from experiments import ablate_architectures"),
        ("slm_jax/models/x.py", "import slm_kernels"),
        ("slm_jax/errors.py", "from . import nn"),
        ("slm_jax/utilities.py", ""),
        ("kernels/slm_kernels/x.py", "from slm_jax.errors import UserError"),
        ("kernels/slm_kernels/x/y.py", "import flax"),
    ],
)
def test_checker_finds_a_violation(path: str, source: str) -> None:
    found = import_violations(source, path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:{max(1, len(source.splitlines()))}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("slm_jax/nn/x.py", "from slm_kernels import flash\nfrom slm_jax.errors import UserError"),
        ("slm_jax/nn/x.py", "from . import linear\nfrom .norm import NormConfig\nimport jax"),
        ("slm_jax/train/x.py", "from slm_jax import __version__, data\nfrom ..models.lm import LM"),
        ("slm_jax/cli.py", "from slm_jax import train, scaling\nimport experiments"),
        ("kernels/slm_kernels/x/y.py", "import math\nimport jax.numpy as jnp\nfrom . import tpu"),
    ],
)
def test_checker_lets_the_rest_pass(path: str, source: str) -> None:
    assert import_violations(source, path) == []


# Addresses of package registries and paths of one machine. No pattern matches its own text.
FORBIDDEN = re.compile(
    rb"https?://[^\s]*/simple\b"
    rb"|https?://(registry|files|deb)\."
    rb"|--(extra-)?index-url"
    rb"|pypi\.org|pythonhosted\.org"
    rb"|(?<![\w.~$)}/-])/(work|root|farm|tmp)/"
)


def forbidden_lines(content: bytes) -> list[int]:
    """Numbers of the lines that hold a registry's address or a machine's path."""
    return [n for n, line in enumerate(content.split(b"\n"), 1) if FORBIDDEN.search(line)]


def test_no_committed_file_names_a_registry_or_a_machine() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in forbidden_lines(file.read_bytes())
    ]
    assert not found, "registry addresses or machine paths:\n" + "\n".join(found)
    locks = [file for file in files if file.name == "uv.lock"]
    assert not locks, "uv.lock names registries: requirements.lock is the lock of this project"


@pytest.mark.parametrize(
    "text",
    [
        "--find=https" + "://host.example/simple/",
        "--index" + "-url file",
        "see https" + "://files.example.com/x",
        "open('/" + "work/data')",
        "/" + "root/.cache/",
    ],
)
def test_forbidden_text_is_found(text: str) -> None:
    assert forbidden_lines(b"first\n" + text.encode()) == [2]
