"""The roll call: processes as threads that call each other on the loopback interface."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from slm_jax.errors import UserError
from slm_jax.parallel.roll_call import numbers, roll_call


def free_address() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def called(*processes: tuple[int, int], seconds: float = 10) -> list[str]:
    """What each process of (its number, how many it was told) hears; empty if all are here."""
    address = free_address()

    def one(process: int, told: int) -> str:
        try:
            roll_call(address, address, told, process, seconds)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(processes)) as pool:
        futures = [pool.submit(one, process, told) for process, told in processes]
        return [future.result() for future in futures]


def test_all_are_here() -> None:
    assert called((3, 4), (0, 4), (2, 4), (1, 4)) == [""] * 4


def test_port_is_free_at_once() -> None:
    address = free_address()
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(roll_call, address, address, 2, i, 10) for i in range(2)]
            assert [future.result() for future in done] == [None, None]


def test_missing_processes_are_named_to_all_that_came() -> None:
    heard = called((0, 4), (2, 4), seconds=0.5)
    assert heard[0] == heard[1]
    assert "JAX_NUM_PROCESSES=4: processes 1, 3 did not come within 0.5 s" in heard[0]


def test_process_told_another_number_is_named() -> None:
    heard = called((0, 2), (1, 3))
    assert heard[0] == heard[1]
    assert "JAX_NUM_PROCESSES=3 on process 1 (127.0.0.1), but 2 on process 0" in heard[0]


def test_same_number_twice_is_named() -> None:
    heard = called((0, 3), (1, 3), (1, 3))
    assert all("JAX_PROCESS_ID=1 twice (127.0.0.1 and 127.0.0.1)" in text for text in heard[:1])
    assert any("JAX_PROCESS_ID=1 twice" in text for text in heard[1:])


def test_no_process_0() -> None:
    (heard,) = called((1, 2), seconds=0.3)
    assert "process 1 did not reach process 0 there within 0.3 s" in heard
    assert "JAX_COORDINATOR_ADDRESS=127.0.0.1:" in heard


def test_stranger_is_ignored() -> None:
    address = free_address()
    host, port = address.split(":")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll_call, address, address, 2, 0, 10)
        stranger = None
        while stranger is None:
            try:
                stranger = socket.create_connection((host, int(port)))
            except ConnectionRefusedError:
                time.sleep(0.01)
        with stranger:
            stranger.sendall(b"GET / HTTP/1.1\n")
            second = pool.submit(roll_call, address, address, 2, 1, 10)
            assert [first.result(), second.result()] == [None, None]


def test_address_in_use_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"process 0 cannot listen on {address}"):
            roll_call(address, address, 2, 0, 60)


def test_numbers() -> None:
    assert numbers([3]) == "process 3"
    assert numbers(list(range(12))) == "processes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."
