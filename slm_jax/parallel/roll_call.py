"""The roll call before `jax.distributed` starts: jax alone would abort without saying who is late.

Process 0 listens where its coordinator will; every other process connects and says its number and
how many processes it was told there are. When all are here, or time is up, or the numbers do not
fit, each gets the same answer: an empty line to go on, or what is wrong.
"""

import contextlib
import socket
import time

from slm_jax.errors import UserError

_LINE = 64  # bytes; who says more is not one of ours
_RETRY = 0.2  # seconds
_LATER = 30.0  # seconds that process 0 may have started after a process that waits for its answer


def numbers(processes: list[int]) -> str:
    """`process 3`, `processes 1, 2`; of many the first ten."""
    shown = ", ".join(map(str, processes[:10])) + (", ..." if len(processes) > 10 else "")
    return f"process{'es' * (len(processes) > 1)} {shown}"


def roll_call(coordinator: str, bind: str, processes: int, process: int, seconds: float) -> None:
    """Returns when all processes are here.

    Args:
        coordinator: `host:port` of process 0, as the others reach it.
        bind: `host:port` that process 0 listens on; host `[::]` is every interface.
        processes: how many there are.
        process: the number of this one.
        seconds: how long to wait for the others.

    Raises:
        UserError: on every process that came; names those that are missing, there twice, or were
            told another number of processes.
    """
    if process:
        problem = _answer(coordinator, processes, process, seconds)
    else:
        problem = _call(coordinator, bind, processes, seconds)
    if problem:
        raise UserError(problem)


def _call(coordinator: str, bind: str, processes: int, seconds: float) -> str:
    """Process 0: hears the others and tells them what is wrong, if anything."""
    until = time.monotonic() + seconds
    here: dict[int, tuple[socket.socket, str]] = {}
    problem = ""
    with contextlib.ExitStack() as sockets:
        try:
            server = sockets.enter_context(_listen(bind))
        except OSError as error:
            return (
                f"JAX_COORDINATOR_ADDRESS={coordinator}: process 0 cannot listen on {bind} "
                f"({error.strerror}): give an address of its machine and a free port"
            )
        while not problem and len(here) < processes - 1:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                connection, (host, *_) = server.accept()
            except TimeoutError:
                missing = [i for i in range(1, processes) if i not in here]
                problem = (
                    f"JAX_NUM_PROCESSES={processes}: {numbers(missing)} did not come within "
                    f"{seconds:g} s: see what became of them on their machines"
                )
                break
            sockets.enter_context(connection)
            connection.settimeout(5)
            said = _read_line(connection).split()
            if len(said) != 3 or said[0] != "slm" or not (said[1] + said[2]).isdecimal():
                continue  # something that tries ports
            index, told = int(said[1]), int(said[2])
            if told != processes:
                problem = (
                    f"JAX_NUM_PROCESSES={told} on process {index} ({host}), but {processes} on "
                    "process 0: give every process the same number"
                )
            elif index in here or not 0 < index < processes:
                first = here[index][1] if index in here else host
                problem = (
                    f"JAX_PROCESS_ID={index} twice ({first} and {host}): number the processes "
                    f"0 to {processes - 1}"
                )
            here.setdefault(index, (connection, host))
        for connection, _ in here.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{problem}\n".encode())
                connection.shutdown(socket.SHUT_WR)
        for connection, _ in here.values():
            _read_line(connection)  # they close first, so that jax can have the port at once
    return problem


def _answer(coordinator: str, processes: int, process: int, seconds: float) -> str:
    """Another process: says that it is here and hears what is wrong, if anything."""
    until = time.monotonic() + seconds
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            connection = socket.create_connection(
                (host.strip("[]"), int(port)), timeout=max(1.0, until - time.monotonic())
            )
            break
        except OSError as error:
            if time.monotonic() > until:
                return (
                    f"JAX_COORDINATOR_ADDRESS={coordinator}: process {process} did not reach "
                    f"process 0 there within {seconds:g} s ({error.strerror or error}): is it "
                    "running, and does a firewall let this port pass?"
                )
            time.sleep(_RETRY)
    with connection:
        connection.settimeout(seconds + _LATER)
        try:
            connection.sendall(f"slm {process} {processes}\n".encode())
            said = connection.makefile("rb").readline()
        except OSError:
            said = b""
    if not said.endswith(b"\n"):
        return (
            f"JAX_COORDINATOR_ADDRESS={coordinator}: process 0 ended while process {process} "
            "waited for the others: see its log"
        )
    return said.decode().strip()


def _listen(bind: str) -> socket.socket:
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    both = host == "::" and socket.has_dualstack_ipv6()
    if host == "::" and not both:
        host = ""  # every interface of a machine without IPv6
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, int(port)), family=family, backlog=1024, dualstack_ipv6=both)


def _read_line(connection: socket.socket) -> str:
    """A short line; empty if there is none."""
    said = b""
    with contextlib.suppress(OSError):
        while not said.endswith(b"\n") and len(said) < _LINE:
            part = connection.recv(_LINE)
            if not part:
                break
            said += part
    return said.decode(errors="replace")
