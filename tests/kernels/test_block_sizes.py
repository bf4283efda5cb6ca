"""The table of block sizes: its entries fit their kernels, which take them; the search fills it."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from slm_kernels import block_sizes, profile, search, table
from slm_kernels.aot import TARGETS, Record
from slm_kernels.aot.compile import pallas_calls
from slm_kernels.block_sizes import Entry, Key, lookup
from slm_kernels.cases import CASES

ENTRIES = block_sizes.read()
KEY = Key("attention_forward", "bfloat16", (("S", 4096), ("D", 128)))
ENTRY = Entry(KEY, "v5e", {"q": 512, "kv": 1024}, "attention S=4096", 99, "0.0.1")


def equation(case: str, shape: dict[str, int], kernel: str):
    """The equation of a kernel in the program of a case, traced and not run."""
    backward = kernel.endswith("backward")
    function, arguments = CASES[case].build(shape, "tpu", backward)
    found, todo = [], [jax.make_jaxpr(function)(**arguments).jaxpr]
    while todo:
        for one in todo.pop().eqns:
            if one.primitive.name == "pallas_call":
                found.append(one)
            else:
                todo += jax.extend.core.jaxprs_in_params(one.params)
    return next(one for one in found if one.params["name"] == kernel)


def text(one) -> str:
    """All that a kernel is: its grid, blocks and body."""
    return f"{one.params['grid_mapping']} {one.params['jaxpr']}"


def vmem(one) -> int:
    """Bytes of the blocks of a kernel, in two buffers, and of its scratch."""
    refs = [v.aval for v in one.params["jaxpr"].invars]
    n = len(one.params["grid_mapping"].block_mappings)
    sizes = [math.prod(r.shape) * r.dtype.itemsize for r in refs if hasattr(r.dtype, "itemsize")]
    return 2 * sum(sizes[:n]) + sum(sizes[n:])


@pytest.mark.parametrize(
    "entry", ENTRIES, ids=[f"{e.key.kernel}-{e.target}-{e.of.split()[1]}" for e in ENTRIES]
)
def test_an_entry_fits_its_kernel_which_takes_it(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, sizes = entry.of.split()
    shape = profile.parse_shape(sizes, CASES[case].shape)
    kernel, candidates = entry.key.kernel, CASES[case].blocks[entry.key.kernel]
    assert entry.blocks in candidates
    with block_sizes.trying({kernel: entry.blocks}):
        want = equation(case, shape, kernel)
    assert vmem(want) <= want.params["compiler_params"].vmem_limit_bytes
    with block_sizes.trying({kernel: next(c for c in candidates if c != entry.blocks)}):
        assert text(equation(case, shape, kernel)) != text(want)
    monkeypatch.setattr(block_sizes, "device_kind", lambda: TARGETS[entry.target].kind)
    with block_sizes.asked() as keys:
        assert text(equation(case, shape, kernel)) == text(want)
    assert entry.key in keys


def test_wide_scans_leave_room_on_the_chip() -> None:
    for width in (4096, 16384):
        shape = {"B": 1, "L": 256, "D": width, "N": 16}
        assert vmem(equation("scan-f32", shape, "selective_scan_backward")) < 48 * 2**20


def test_each_device_dtype_and_class_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sizes, "read", lambda: [ENTRY])
    block_sizes._by_key.cache_clear()
    try:
        assert lookup("attention_forward", "bfloat16", S=4096, D=128) == {}  # on this CPU
        monkeypatch.setattr(block_sizes, "device_kind", lambda: "TPU v5 lite")
        for size in (2049, 4096):  # of one class
            assert lookup("attention_forward", "bfloat16", S=size, D=128) == ENTRY.blocks
        assert lookup("attention_forward", "bfloat16", S=4097, D=128) == {}
        assert lookup("attention_forward", "float32", S=4096, D=128) == {}
        assert lookup("attention_backward", "bfloat16", S=4096, D=128) == {}
    finally:
        block_sizes._by_key.cache_clear()


def test_a_written_table_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "table.toml"
    slower = dataclasses.replace(ENTRY, cycles=100)
    other = dataclasses.replace(ENTRY, target="v6e")
    block_sizes.write([slower, other, ENTRY], file)
    assert block_sizes.read(file) == [ENTRY, other]  # the later one of the same
    assert block_sizes.read() == ENTRIES


def simulated(cycles: list[int | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes a search find these cycles, and write elsewhere."""
    line = '  ROOT %k = f32[] custom-call(), custom_call_target="tpu_custom_call"'

    def compile_jobs(target, jobs, flags):
        assert len(jobs) == len(cycles)
        known = [
            f'ENTRY %main () -> f32[] {{\n{line}, x={{"estimated_cycles":"{n}"}}' for n in cycles
        ]
        return [
            Record(job, error="" if n else "gave up", hlo=text if n else "")
            for job, n, text in zip(jobs, cycles, known, strict=True)
        ]

    monkeypatch.setattr(search, "compile_jobs", compile_jobs)
    monkeypatch.setattr(search, "libtpu_version", lambda: "0.0.1")
    monkeypatch.setattr(block_sizes, "read", lambda: [])
    monkeypatch.setattr(
        block_sizes,
        "write",
        lambda entries, put=block_sizes.write: put(entries, tmp_path / "t.toml"),
    )


@pytest.mark.parametrize("backward", [False, True])
def test_search_stores_the_fastest(
    backward: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernel = "selective_scan_backward" if backward else "selective_scan_forward"
    candidates = CASES["scan"].blocks[kernel]
    read = block_sizes.read
    simulated([None, 7, 8][: len(candidates)], monkeypatch, tmp_path)
    shape = {"B": 1, "L": 500, "D": 128, "N": 16}
    entry = search.search("scan", "v6e", shape, backward)
    want = Key(kernel, "bfloat16", (("L", 512), ("D", 128), ("N", 16)))
    assert (entry.key, entry.blocks, entry.cycles) == (want, candidates[1], 7)
    assert read(tmp_path / "t.toml") == [entry]


def test_search_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kernel='ssd' has no block sizes to search: choose from"):
        search.search("ssd", "v5e", CASES["ssd"].shape, False)
    simulated([None] * 3, monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="none of its block sizes could be simulated"):
        search.search("scan", "v5e", CASES["scan"].shape, False)


def test_table_is_filled_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "CACHE", tmp_path / "cache")
    sources = ["one"]
    monkeypatch.setattr(table, "fingerprint", lambda target: sources[0])
    file = tmp_path / "README.md"
    file.write_text("before\n")
    seen: list[table.Line] = []

    def measure(line: table.Line) -> table.Cell:
        seen.append(line)
        if line.implementation == "splash":
            return table.Cell(error="gave up")
        return table.Cell(1_234, 2.5, 3_000_000, 2_000_000, 0.5, "MXU", "0/9")

    lines = [table.LINES[0], next(x for x in table.LINES if x.implementation == "splash")]
    with pytest.raises(ValueError, match="no place for it: add the lines <!-- profile-kernels"):
        table.write(file, measure, lines)
    file.write_text(f"before\n{table.BEGIN}old\n{table.END}after\n")
    table.write(file, measure, lines)
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| v5e | **ours** | 1,234 | 2.5 | 3.0, 2.0 MB | 50% (MXU) | 0/9 |" in text
    assert "| splash | gave up |" in text
    table.write(file, measure, lines)
    assert seen == lines  # the second time nothing was simulated
    assert file.read_text() == text
    sources[0] = "another"
    table.write(file, measure, lines[:1])
    assert seen == [*lines, lines[0]]


def test_lines_are_programs() -> None:
    for line in table.LINES:
        case = CASES[line.case]
        assert set(dict(line.sizes)) <= set(case.shape)
        assert line.target in TARGETS
        small = (
            {**table.shape(line), "S": 256} if "S" in case.shape else {**case.shape, **case.small}
        )
        function, arguments = case.build(small, line.implementation, line.backward)
        if line.implementation in ("tpu", "jax", "splash"):
            assert pallas_calls(jax.make_jaxpr(function)(**arguments).jaxpr)


@pytest.mark.parametrize("name", ["associative_scan", "lax.scan"])
def test_public_scans_compute_the_scan(name: str) -> None:
    case = CASES["scan-f32"]
    rng = np.random.default_rng(0)
    shape = {"B": 2, "L": 5, "D": 3, "N": 2}
    args = {k: rng.normal(size=x.shape).astype(x.dtype) for k, x in case.arguments(shape).items()}
    args |= {"a": -np.exp(args["a"]), "dt": np.abs(args["dt"])}
    want = case.function("reference")(**args)
    np.testing.assert_allclose(case.against[name](**args), want, rtol=1e-5, atol=1e-5)
