"""Processes that can be killed: real ones that hang, stop, crash and lose their parent."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from alpro_stream.media.killable import KillableProcess, wait_for

CHILD = """
import os, resource, signal, sys
from alpro_stream.media.killable import connect, limit_memory, write_all

connection, (buffer,) = connect(sys.argv[1:])
settings = connection.recv_bytes()
while True:
    message = connection.recv_bytes()
    if message == b"hang":
        while True:
            pass
    elif message == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif message == b"exit":
        sys.exit(3)
    elif message == b"memory":
        limit_memory(200 << 20)
        try:
            bytearray(300 << 20)
        except MemoryError:
            connection.send_bytes(b"too much")
    elif message == b"limits":
        limits = resource.getrlimit(resource.RLIMIT_CORE)[0], os.environ["OMP_NUM_THREADS"]
        connection.send_bytes(repr(limits).encode())
    elif message == b"interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        connection.send_bytes(b"still here")
    else:
        write_all(buffer, message)
        connection.send_bytes(settings + b" " + message)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Makes processes that run `CHILD`, and ends them."""
    (tmp_path / "killable_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    started = []
    with tempfile.TemporaryFile() as buffer:

        def make():
            process = KillableProcess("killable_child", (buffer.fileno(),), b"settings")
            process.buffer = buffer.fileno()
            started.append(process)
            return process

        yield make
        for process in started:
            process.end()


def said(process, seconds=30.0):
    """What the process says within so many seconds."""
    process.allow(seconds)
    talking, late = wait_for([process])
    assert (talking, late) == ([process], [])
    return process.connection.recv_bytes()


def pid_of(process):
    return process._popen.pid


def test_it_gets_settings_messages_and_open_files_and_one_process_serves_them_all(start):
    process = start()
    assert process.send(b"one")
    assert said(process) == b"settings one"
    assert not process.send(b"two")
    assert said(process) == b"settings two"
    assert os.pread(process.buffer, 100, 0) == b"onetwo"


def test_it_has_one_thread_leaves_no_core_file_and_ignores_an_interrupt(start):
    process = start()
    process.send(b"limits")
    assert said(process) == b"(0, '1')"
    process.send(b"interrupt")
    assert said(process) == b"still here"


@pytest.mark.parametrize(("message", "words"), [(b"crash", "was ended by signal 11"), (b"exit", "ended with status 3")])
def test_one_that_ends_says_how_and_the_next_message_starts_another(start, message, words):
    process = start()
    process.send(message)
    with pytest.raises((EOFError, OSError)):
        said(process)
    assert process.how_it_ended() == words
    assert process.send(b"again")
    assert said(process) == b"settings again"


def test_one_that_died_between_two_messages_is_replaced(start):
    process = start()
    process.send(b"one")
    said(process)
    os.kill(pid_of(process), signal.SIGKILL)
    process._popen.wait()
    assert process.send(b"two")
    assert said(process) == b"settings two"


@pytest.mark.parametrize("kind", ["loops", "stopped"])
def test_one_that_hangs_is_late_and_can_be_killed_while_another_one_talks(start, kind):
    hanging, fine = start(), start()
    for process in (hanging, fine):
        process.send(b"start")
        said(process)
    if kind == "stopped":
        os.kill(pid_of(hanging), signal.SIGSTOP)
    hanging.send(b"hang")
    hanging.allow(30)
    fine.send(b"work")
    fine.allow(30)
    assert wait_for([hanging, fine]) == ([fine], [])
    fine.connection.recv_bytes()
    hanging.allow(1.0)
    assert wait_for([hanging, fine]) == ([], [hanging])
    assert time.monotonic() < fine.deadline
    gone = pid_of(hanging)
    hanging.end()
    assert not psutil.pid_exists(gone)


def test_memory_is_limited(start):
    process = start()
    process.send(b"memory")
    assert said(process) == b"too much"


PARENT = """
import sys, tempfile, time
from alpro_stream.media.killable import KillableProcess

with tempfile.TemporaryFile() as buffer:
    process = KillableProcess("killable_child", (buffer.fileno(),), b"settings")
    process.send(b"start")
    process.connection.recv_bytes()
    process.send(b"hang")
    print(process._popen.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("start")
def test_one_that_hangs_ends_when_its_parent_is_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=60)
    assert alive == []
