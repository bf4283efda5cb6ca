"""What processes tell each other, as threads that share a dictionary (`test_processes` has real
ones)."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import pytest

from slm_jax.errors import UserError
from slm_jax.parallel import distributed


class Store:
    """The part of jax's coordination client that is used."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: not there")
            return self.values[key]


Together = Callable[[Callable[[int], Any]], list[Any]]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Together:
    """Calls a function with 0, 1, 2 in three processes; their values, or the text of errors."""
    here = threading.local()
    store = Store()
    monkeypatch.setattr(distributed, "_client", lambda: store)
    monkeypatch.setattr(distributed, "_n_processes", lambda: 3)
    monkeypatch.setattr(distributed, "index", lambda: here.index)
    monkeypatch.setattr(distributed, "_key", lambda name: f"slm/{name}")
    monkeypatch.setenv("SLM_WAIT_SECONDS", "1")

    def run(function: Callable[[int], Any]) -> list[Any]:
        def one(index: int) -> Any:
            here.index = index
            try:
                return function(index)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(one, range(3)))

    return run


def test_a_process_alone_waits_for_nobody() -> None:
    assert not distributed.joined()
    assert distributed.is_first()
    assert distributed.on_first("x", lambda: (1, 2)) == (1, 2)
    distributed.check_same("x", {"a": 1})
    distributed.leave()


def test_process_0_decides_for_all(together: Together) -> None:
    asked = []

    def decide(index: int) -> dict[str, float]:
        asked.append(index)
        return {"loss": 0.1}

    got = together(lambda index: distributed.on_first("x", lambda: decide(index)))
    assert got == [{"loss": 0.1}] * 3
    assert asked == [0]


def test_its_mistake_is_that_of_all(together: Together) -> None:
    def refuse() -> None:
        raise UserError("out=x is not empty: choose another")

    assert (
        together(lambda _: distributed.on_first("x", refuse))
        == ["out=x is not empty: choose another"] * 3
    )


def test_no_decision(together: Together) -> None:
    def late(index: int) -> None:
        if index:
            distributed.on_first("run folder", dict)

    got = together(late)
    assert got[1] == got[2] == ("run folder: process 0 has not decided within 1 s: see its log")


def test_all_are_about_to_do_the_same(together: Together) -> None:
    values = {"steps": 3, "model": {"layers": [1, 2]}}
    assert together(lambda _: distributed.check_same("run", values)) == [None] * 3


def test_process_with_another_configuration_is_named(together: Together) -> None:
    def differ(index: int) -> None:
        distributed.check_same("run", {"steps": 3, "seed": int(index == 2), "data": "a"})

    for text in together(differ):
        assert text.startswith("run: process 2 has another seed than process 0")


def test_process_that_does_not_come_is_named(together: Together) -> None:
    def stay_away(index: int) -> None:
        if index != 1:
            distributed.check_same("run", {"steps": 3})

    got = together(stay_away)
    assert got[0] == got[2] == "run: process 1 of 3 did not come within 1 s: see the logs there"
