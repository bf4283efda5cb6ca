import pytest

from slm_jax.errors import UserError
from slm_jax.parallel.launcher import Launch, find_launch, heartbeat_seconds, wait_seconds

# What other launchers set: this machine may be one of theirs.
OTHERS = (
    *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    *("OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID"),
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_PORT"),
    *("JAX_COORDINATOR_BIND_ADDRESS", "SLM_WAIT_SECONDS", "SLM_HEARTBEAT_SECONDS"),
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OTHERS:
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_process_alone() -> None:
    assert find_launch() is None


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    given(
        monkeypatch,
        JAX_COORDINATOR_ADDRESS="10.0.0.1:1234",
        JAX_NUM_PROCESSES="4",
        JAX_PROCESS_ID="3",
    )
    assert find_launch() == Launch("10.0.0.1:1234", 4, 3)
    given(monkeypatch, JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0")
    assert find_launch() is None


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    given(
        monkeypatch,
        SLURM_JOB_ID="4099",
        SLURM_STEP_NODELIST="node[07-09],gpu1",
        SLURM_NTASKS="8",
        SLURM_PROCID="5",
        SLURM_LOCALID="1",
    )
    launch = find_launch()
    assert launch is not None
    assert launch[1:] == (8, 5, [1])
    host, port = launch.coordinator.split(":")
    assert host == "node07"
    assert 61440 <= int(port) < 65536
    given(monkeypatch, SLURM_NTASKS="1", SLURM_PROCID="0")
    assert find_launch() is None  # and it keeps all its devices


def test_variables_win_over_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    test_slurm(monkeypatch)
    test_variables(monkeypatch)


def test_pod_that_is_no_job_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert find_launch() is None  # and jax does not warn that it cannot ask the cluster


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "without JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two must be an integer"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 is not below JAX_NUM_PROCESSES=2"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host is not host:port"),
    ],
)
def test_errors(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    if "without" not in message:
        given(
            monkeypatch,
            JAX_COORDINATOR_ADDRESS="host:1",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID="0",
        )
    given(monkeypatch, **variables)
    with pytest.raises(UserError, match=message):
        find_launch()


@pytest.mark.parametrize(
    ("coordinator", "bind"),
    [
        ("10.0.0.1:12", "10.0.0.1:12"),
        ("[fd00::1]:12", "[fd00::1]:12"),
        # Where a machine's own name leads on the machine itself is often the loopback interface.
        ("node07:12", "[::]:12"),
    ],
)
def test_only_an_address_that_is_an_ip_is_listened_on(coordinator: str, bind: str) -> None:
    assert Launch(coordinator, 2, 0).bind == bind


def test_bind_address_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, JAX_COORDINATOR_BIND_ADDRESS="127.0.0.1:9")
    assert Launch("node07:12", 2, 0).bind == "127.0.0.1:9"


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (wait_seconds(), heartbeat_seconds()) == (300, 100)
    given(monkeypatch, SLM_WAIT_SECONDS="20", SLM_HEARTBEAT_SECONDS="5")
    assert (wait_seconds(), heartbeat_seconds()) == (20, 5)
    given(monkeypatch, SLM_HEARTBEAT_SECONDS="0")
    with pytest.raises(UserError, match="SLM_HEARTBEAT_SECONDS=0 must be an integer, at least 1"):
        heartbeat_seconds()
