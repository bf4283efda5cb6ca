"""Several processes that train one model: how they become one job, agree, and end together.

A launcher (launcher.py) starts the same command once a host or device; `join` makes the processes
one job before any device is touched; a process alone it leaves alone. From then on process 0 alone
writes files and prints, what it finds out reaches the others through `on_first`, and an error of
one ends all (`fail`).
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed

from slm_jax.errors import UserError
from slm_jax.exit_codes import LOST
from slm_jax.parallel.launcher import find_launch, heartbeat_seconds, wait_seconds
from slm_jax.parallel.roll_call import numbers, roll_call

_SHUTDOWN_SECONDS = 30
_ANSWER_SECONDS = 3.0  # for a sign of life after an error
_ALARM = "slm/alarm"
_FOREVER = 24 * 3600.0

_calls: Counter[str] = Counter()  # so that a name can be used again


def join() -> None:
    """Makes this process part of its job, if it is one of several; call before a device is used.

    Waits until all are here. Afterwards stdout of all but process 0 leads nowhere, and a thread
    ends this process as soon as another one reports an error with `fail`.

    Raises:
        UserError: on every process that came, if some did not or do not fit.
    """
    launch = None if joined() else find_launch()
    if launch is None:
        return
    seconds = wait_seconds()
    roll_call(launch.coordinator, launch.bind, launch.processes, launch.process, seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        launch.coordinator,
        launch.processes,
        launch.process,
        launch.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=seconds + 1,
        heartbeat_timeout_seconds=heartbeat_seconds(),
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        coordinator_bind_address=launch.bind,
    )
    threading.Thread(target=_listen_for_alarm, name="slm alarm", daemon=True).start()
    if launch.process:
        _flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # C++ libraries print, too


def joined() -> bool:
    """Whether this is one of several processes."""
    return _client() is not None and _n_processes() > 1


def is_first() -> bool:
    """Whether this process writes files and prints: process 0, or one alone."""
    return index() == 0


def index() -> int:
    """The number of this process; 0 for one alone."""
    return jax_distributed.global_state.process_id


def on_first[T](name: str, decide: Callable[[], T], *, seconds: float | None = None) -> T:
    """What `decide` returns on process 0, on every process; they all call this in the same order.

    Args:
        name: what is decided, for messages.
        decide: called on process 0 only; its value must be JSON.
        seconds: how long the others wait; default `SLM_WAIT_SECONDS`.

    Raises:
        UserError: on every process if `decide` raises one, or does not come to an end in time.
    """
    if not joined():
        return decide()
    key = _key(name)
    if is_first():
        try:
            value = decide()
        except UserError as error:
            _client().key_value_set(key, json.dumps({"error": str(error)}))
            raise
        _client().key_value_set(key, json.dumps({"value": value}))
        return value
    seconds = wait_seconds() if seconds is None else seconds
    text = _get(key, seconds)
    if text is None:
        raise UserError(f"{name}: process 0 has not decided within {seconds:g} s: see its log")
    verdict = json.loads(text)
    if "error" in verdict:
        raise UserError(verdict["error"])
    return verdict["value"]


def check_same(name: str, values: dict[str, Any]) -> None:
    """A barrier at which all processes compare what they are going to do.

    Args:
        name: what it is, for messages.
        values: JSON by name.

    Raises:
        UserError: on every process; names those that did not come within `SLM_WAIT_SECONDS`, or
            that have other values, and which.
    """
    if not joined():
        return
    digests = {
        k: hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest()[:16]
        for k, v in values.items()
    }
    key = _key(name)
    _client().key_value_set(f"{key}/{index()}", json.dumps(digests))

    def compare() -> None:
        said = _collect(name, key)
        mine = json.loads(said[0])
        for process in range(_n_processes()):
            other = json.loads(said[process])
            different = [k for k in mine | other if mine.get(k) != other.get(k)]
            if different:
                raise UserError(
                    f"{name}: process {process} has another {', '.join(different)} than process 0: "
                    "start all with the same command, code and data"
                )

    # Process 0 may itself wait so long for the others.
    on_first(name, compare, seconds=2 * wait_seconds())


def leave() -> None:
    """Ends the work of this process with that of all others; does nothing for a process alone.

    The others wait for process 0 as long as it lives. Process 0 waits `SLM_WAIT_SECONDS` for them
    and otherwise names those that have not come, and fails.
    """
    if not joined():
        return
    _flush()
    _client().key_value_set(f"slm/end/{index()}", "")
    if is_first():
        try:
            _collect("end", "slm/end")
        except UserError as error:
            _say(str(error))
            fail(str(error), 1)
        _client().key_value_set("slm/over", "")
    else:
        _get("slm/over", _FOREVER)
    jax.distributed.shutdown()


def fail(message: str, code: int) -> NoReturn:
    """Ends this process and, within seconds, all others, with this exit code.

    Those that give no sign of life are named on stderr: the error may only be what the loss of
    them looks like from here, and the exit code is then `LOST`. May be called in any thread. Not by
    an exception: leaving every `with` block would wait for processes that no longer come.

    Args:
        message: one line for the logs of the others; this process has printed its own.
        code: exit code, not 0.
    """
    _flush()
    report = {"process": index(), "message": message.partition("\n")[0], "code": code}
    try:
        _client().key_value_set(_ALARM, json.dumps(report))
    except jax.errors.JaxRuntimeError:
        # Another one was first, or process 0 is gone: the thread that listens ends this process.
        time.sleep(2 * _ANSWER_SECONDS)
        os._exit(code)
    until = time.monotonic() + _ANSWER_SECONDS
    others = [i for i in range(_n_processes()) if i != index()]
    silent = [i for i in others if _get(f"{_ALARM}/{i}", until - time.monotonic()) is None]
    if silent and code == 1:
        code = LOST
        _say(
            f"no sign of life from {numbers(silent)} of {_n_processes()}: killed, or the machine "
            "is gone; start all processes again, a run goes on from its newest checkpoint"
        )
    _exit(code)


def _listen_for_alarm() -> None:
    """Waits for a process that fails, says so, and ends this one."""
    while True:
        try:
            text = _client().blocking_key_value_get(_ALARM, int(1000 * _FOREVER))
            break
        except (jax.errors.JaxRuntimeError, AttributeError) as error:
            if "DEADLINE" in str(error):
                continue
            if "UNAVAILABLE" in str(error):
                _say("process 0 is gone: see its log; start all processes again")
                os._exit(LOST)
            return  # `leave` has shut the connection
    report = json.loads(text)
    if report["process"] == index():
        return  # `fail` goes on
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_ALARM}/{index()}", "")
    _say(f"stopped, because process {report['process']} failed: {report['message']}")
    _exit(report["code"])


def _exit(code: int) -> NoReturn:
    _flush()
    if is_first():
        time.sleep(1)  # the others read through this process
    os._exit(code)


def _say(text: str) -> None:
    # One write: the threads of C++ libraries print at the same time.
    sys.stderr.write(f"error: process {index()}: {text}\n")
    sys.stderr.flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _collect(name: str, key: str) -> dict[int, str]:
    """What every process has said under a key.

    Raises:
        UserError: if some have not within `SLM_WAIT_SECONDS`.
    """
    seconds = wait_seconds()
    until = time.monotonic() + seconds
    said = {i: _get(f"{key}/{i}", until - time.monotonic()) for i in range(_n_processes())}
    missing = [i for i, text in said.items() if text is None]
    if missing:
        raise UserError(
            f"{name}: {numbers(missing)} of {_n_processes()} did not come within {seconds:g} s: "
            "see the logs there"
        )
    return {i: text for i, text in said.items() if text is not None}


def _get(key: str, seconds: float) -> str | None:
    """The value of a key as soon as it has one; `None` if that is not within so many seconds."""
    try:
        text: str = _client().blocking_key_value_get(key, max(1, int(1000 * seconds)))
        return text
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def _key(name: str) -> str:
    _calls[name] += 1
    return f"slm/{name}/{_calls[name]}"


def _client() -> Any:
    return jax_distributed.global_state.client


def _n_processes() -> int:
    return jax_distributed.global_state.num_processes
