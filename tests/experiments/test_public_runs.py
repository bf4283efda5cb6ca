import gzip
import hashlib
import re

import numpy as np
import public_runs
import pytest

from slm_jax.errors import UserError

FILES = {
    "chinchilla_figure4": (245, "58034f3a68b73feddae1d12e00e896c7402bb5c8899b772bba7ee2085dba1b3c"),
    "datablations_c4": (145, "a8bc652de00d5c0e2d5bbd04048e3b7be8bc5b9e5bbe3fcc34c6d51bd1206554"),
    "gadre_overtraining": (90, "a5aa9f1372f2c5bc11a270c25de5a9ef07fd8bac0a12938c1f275bc1b3135e80"),
    "multi_power_law": (3550, "8345104ca27f2f0dcfb75cca395a60b7b8a5f4b145fc2310b3d89ec3d45f9deb"),
    "olmo_ladder": (1566, "7c40cde0dad63ba886e11f8dd37596c414e42d8ed07cf28eb581b75dc07d5c71"),
    "routing": (135, "a2f8ff177efee8b283639b551b8d9c206540cf88e63dca1e8c7cd8cf9ec48538"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_the_ones_that_were_fitted(name):
    rows, digest = FILES[name]
    data = (public_runs.DATA / f"{name}.csv.gz").read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    assert len(gzip.decompress(data).splitlines()) == rows + 1


def test_no_file_is_unlisted():
    shipped = {p.name.removesuffix(".csv.gz") for p in public_runs.DATA.glob("*.gz")}
    assert shipped == set(FILES)
    readme = (public_runs.DATA / "README.md").read_text()
    for name, (rows, _) in FILES.items():
        assert re.search(rf"`{name}\.csv\.gz` \| {rows:,} \|", readme), name


def test_chinchilla_leaves_out_the_highest_losses_and_says_so():
    rows = public_runs.chinchilla()
    assert len(rows) == 240
    assert [len(d.rows) for d in rows.dropped] == [5]
    everything = public_runs.chinchilla(drop_highest=0)
    assert rows["loss"].max() < np.sort(everything["loss"])[-5]
    np.testing.assert_allclose(6 * rows["N"] * rows["D"], rows["C"])
    assert len(public_runs.chinchilla(largest_C=1e21)) == 217


def test_gadre_and_ladder_have_the_runs_of_the_papers():
    for corpus in ("c4_original", "rpj", "rw_original"):
        rows = public_runs.gadre(corpus)
        assert len(rows) == 30
        np.testing.assert_allclose(rows["M"], 20 * rows["multiplier"], rtol=0.03)
    ladder = public_runs.olmo_ladder()
    assert len(set(ladder["run"])) == 16
    for run in set(ladder["run"]):
        assert np.all(np.diff(ladder.take(ladder["run"] == run)["D"]) > 0)


@pytest.mark.parametrize(("router", "models"), [("S-Base", 48), ("RL-R", 49), ("Hash", 46)])
def test_routing_pools_dense_models_with_each_router(router, models):
    rows = public_runs.routing(router)
    assert len(rows) == models
    assert sum(rows["router"] == "Dense") == 4
    assert rows["N"].max() < 4e8


def test_routing_reads_the_authors_file(tmp_path):
    path = tmp_path / "curves.csv"
    head = (
        "hyper_id,step,routing_frequency,k,seed,router_type,dense_parameter_count,num_experts,"
        "loss_validation\n"
    )
    path.write_text(
        head
        + "1,249000,0.5,1,42,Hash,1e8,8,2.5\n"
        + "1,1000,0.5,1,42,Hash,1e8,8,5.0\n"
        + "2,249000,0.5,1,42,Dense,1e8,1,2.9\n"
        + "3,249000,0.5,2,42,Hash,1e8,8,2.4\n"
        + "4,249000,0.25,1,42,Hash,1e8,8,2.3\n"
        + "5,249000,0.5,1,7,Hash,1e8,8,2.2\n"
    )
    rows = public_runs.routing("Hash", path)
    assert rows["loss"].tolist() == [2.5, 2.9]
    with pytest.raises(UserError, match=r"router='RL-R'.*Dense, Hash"):
        public_runs.routing("RL-R", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column hyper_id"),
        ("a,b\n", "no rows"),
        (b"\x1f\x8b broken", "not a CSV table"),
    ],
)
def test_routing_refuses_other_files(tmp_path, text, message):
    path = tmp_path / "curves.csv.gz"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        public_runs.routing("Hash", path)
    with pytest.raises(UserError, match="not a file"):
        public_runs.routing("Hash", tmp_path / "absent")


def test_schedules_are_those_of_the_runs():
    # Learning rates as logged in the authors' files, by step.
    logged = {
        ("constant_24000", 23936): 3e-4,
        ("cosine_24000", 2288): 0.0002999771173709568,
        ("cosine_24000", 23920): 3.000893868085248e-05,
        ("cosine_72000", 71792): 3.0005909062159318e-05,
        ("wsd_20000_24000", 20064): 0.0002891487070871911,
        ("wsd_20000_24000", 21088): 0.00016036930781909145,
        ("wsdld_20000_24000", 20448): 0.00026975999999999997,
    }
    for (name, step), rate in logged.items():
        rates = public_runs.learning_rates(name)
        assert len(rates) == int(name.split("_")[-1])
        assert rates[step] == pytest.approx(rate, rel=1e-9), (name, step)


def test_loss_curves_end_where_their_schedule_does():
    for size in ("25", "100"):
        curves = public_runs.loss_curves(size)
        assert set(curves) == set(public_runs.SCHEDULES)
        for curve in curves.values():
            assert 150 < len(curve.loss) < 600
            assert curve.at.max() > len(curve.learning_rates) - 200
