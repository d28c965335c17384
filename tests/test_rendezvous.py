# SPDX-License-Identifier: Apache-2.0
"""Processes find each other, or every one of them gets the line that says why not."""

import re
import socket
import threading
import time
from contextlib import suppress

import pytest

from meshwen.errors import MeshwenError
from meshwen.parallel import rendezvous


@pytest.fixture
def coordinator():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def outcomes(coordinator, given, others, timeout=20.0):
    """What process 0 and each other (the number it was given, its id) raise, as text; "" if none.

    The others come one after the other.
    """
    found = {}

    def run(key, part, *arguments):
        try:
            part(coordinator, *arguments)
            found[key] = ""
        except MeshwenError as error:
            found[key] = str(error)

    threads = [threading.Thread(target=run, args=("first", rendezvous.gather, given, timeout))]
    threads += [
        threading.Thread(target=run, args=(n, rendezvous.join, processes, index, timeout))
        for n, (processes, index) in enumerate(others)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found["first"], *(found[n] for n in range(len(others)))]


def test_processes_of_one_mind_meet_and_leave_the_port_free(coordinator):
    for _ in range(2):
        assert outcomes(coordinator, 4, [(4, 3), (4, 1), (4, 2)]) == ["", "", "", ""]


def test_another_number_of_processes_is_told_to_all(coordinator):
    found = outcomes(coordinator, 2, [(3, 1)])
    assert len(set(found)) == 1
    assert re.search("process 0 was started with 2 processes, process 1 .* with 3", found[0])


def test_an_id_that_was_given_twice_is_told_to_both_who_have_it_and_to_process_0(coordinator):
    found = outcomes(coordinator, 3, [(3, 1), (3, 1)])
    assert len(set(found)) == 1
    assert "process id 1 was given twice" in found[0]


def test_process_0_says_who_did_not_come_and_tells_who_did(coordinator):
    found = outcomes(coordinator, 4, [(4, 2)], timeout=1.0)
    assert found[0] == found[1]
    assert "not all of the 4 processes came within 1 s; processes 1, 3 did not" in found[0]


def test_one_that_came_left_and_comes_again_is_not_two(coordinator):
    address = rendezvous.split_address(coordinator)

    def leave_at_once():
        with rendezvous._connected(coordinator, 20) as connection:
            connection.recv(100)
            connection.sendall(b'{"processes": 3, "index": 1, "name": "a"}\n')

    found = []
    gathering = threading.Thread(
        target=lambda: found.append(outcomes(coordinator, 3, [])), daemon=True
    )
    gathering.start()
    leave_at_once()
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[" * 5000 + b"\n", b'{"index": []}\n', b""):
        with socket.create_connection(address, timeout=5) as stranger:
            stranger.sendall(noise)
    others = [
        threading.Thread(target=rendezvous.join, args=(coordinator, 3, index, 20.0))
        for index in (1, 2)
    ]
    for other in others:
        other.start()
    for thread in (*others, gathering):
        thread.join(30)
    assert found == [[""]]


def test_what_waits_for_nobody_is_not_joined(coordinator):
    with socket.create_server(rendezvous.split_address(coordinator)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"\0\0\x12\4\0\0\0\0\0")  # As gRPC begins.

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(MeshwenError, match="what listens there waits for no process; all of"):
            rendezvous.join(coordinator, 2, 1, 5.0)
        answering.join(10)


def test_a_process_0_that_ends_while_others_wait_is_an_error(coordinator):
    with socket.create_server(rendezvous.split_address(coordinator)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"meshwen rendezvous 1\n")
                connection.recv(4096)

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(MeshwenError, match="process 0 ended while it waited for the others"):
            rendezvous.join(coordinator, 2, 1, 5.0)
        answering.join(10)


def test_who_sends_a_byte_at_a_time_holds_nobody_up(coordinator, monkeypatch):
    monkeypatch.setattr(rendezvous, "_PATIENCE", 0.3)
    done = threading.Event()

    def drip():
        with rendezvous._connected(coordinator, 10.0) as connection, suppress(OSError):
            while not done.wait(0.1):
                connection.sendall(b" ")

    dripping = threading.Thread(target=drip)
    dripping.start()
    began = time.monotonic()
    with pytest.raises(MeshwenError, match="not all of the 2 processes came within 1 s"):
        rendezvous.gather(coordinator, 2, 1.0)
    took = time.monotonic() - began
    done.set()
    dripping.join(10)
    assert took < 10
