"""The wait of a listener for connections, on a socket of its own and on a shared one."""

from __future__ import annotations

import socket

from netproxy.listener.sockets.accept_wait import AcceptWait, SharedAcceptWait
from tests.support.sockets import SECONDS, Task, listen, wait_until


def test_wait_of_an_own_socket_ends_with_a_connection_and_with_wake() -> None:
    wait = AcceptWait()
    with listen() as listening:
        wait.watch(listening)
        with socket.create_connection(listening.getsockname()):
            Task(wait.wait).result()
            listening.accept()[0].close()
        waiting = Task(wait.wait)
        assert not waiting.done
        wait.wake()
        waiting.result()
        wait.wake()
        wait.wait()
    wait.close()


def test_wait_of_a_shared_socket_ends_with_a_connection() -> None:
    wait = SharedAcceptWait()
    with listen() as listening:
        wait.watch(listening)
        waiting = Task(wait.wait)
        with socket.create_connection(listening.getsockname()):
            waiting.result()
            listening.accept()[0].close()
    wait.close()


def test_wake_of_a_shared_socket_leaves_it_open_for_others() -> None:
    ours, others = SharedAcceptWait(), SharedAcceptWait()
    with listen() as listening, listening.dup() as duplicate:
        ours.watch(listening)
        others.watch(duplicate)
        still_waiting = Task(others.wait)
        waiting = Task(ours.wait)
        ours.wake()
        waiting.result()
        # Now and from now on.
        ours.wait()
        ours.close()
        assert not still_waiting.done
        with socket.create_connection(listening.getsockname(), SECONDS):
            still_waiting.result()
            duplicate.accept()[0].close()
    others.close()


def test_connection_wakes_one_of_those_that_share_a_socket() -> None:
    waits = [SharedAcceptWait() for _ in range(4)]
    with listen() as listening:
        tasks = []
        for wait in waits:
            wait.watch(listening)
            tasks.append(Task(wait.wait))
        with socket.create_connection(listening.getsockname()):
            wait_until(lambda: any(task.done for task in tasks))
            listening.accept()[0].close()
        for wait, task in zip(waits, tasks, strict=True):
            wait.wake()
            task.result()
            wait.close()
