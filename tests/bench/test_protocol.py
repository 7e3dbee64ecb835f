"""Whole JSON lines over pipes, with deadlines; and a worker that answers anything else is done with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.bench.protocol import Channel, DeadlineError, EndOfStreamError
from moebench.bench.ring import WorkerDiedError, WorkerError, WorkerProcess, WorkerTimeoutError


@pytest.fixture
def ends():
    """A channel, and the descriptors of the other side: what it reads from and what it writes to."""
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    channel = Channel(ours_in, ours_out)
    yield channel, theirs_in, theirs_out
    channel.close()
    for descriptor in (theirs_in, theirs_out):
        try:
            os.close(descriptor)
        except OSError:
            continue


def test_a_channel_is_closed_once(ends):
    """The second time the numbers of its descriptors may be those of somebody else's files."""
    channel, *_ = ends
    channel.close()
    others = os.pipe()
    channel.close()
    assert all(os.fstat(number) for number in others)
    for number in others:
        os.close(number)


def test_a_message_is_one_line(ends):
    channel, theirs_in, _ = ends
    channel.send({"op": "hello", "text": "two\nlines"})
    data = os.read(theirs_in, 1000)
    assert data.count(b"\n") == 1
    assert json.loads(data) == {"op": "hello", "text": "two\nlines"}


def test_a_line_in_pieces_and_two_lines_at_once(ends):
    channel, _, theirs_out = ends
    os.write(theirs_out, b'{"a": ')
    with pytest.raises(DeadlineError):
        channel.receive(0.01)
    os.write(theirs_out, b'1}\n{"b": 2}\n{"c"')
    assert channel.receive(1) == {"a": 1}
    assert channel.receive(0) == {"b": 2}
    with pytest.raises(DeadlineError):
        channel.receive(0)
    os.write(theirs_out, b": 3}\n")
    assert channel.receive(1) == {"c": 3}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_whatever_is_sent_arrives_in_order(messages):
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    here, there = Channel(ours_in, ours_out), Channel(theirs_in, theirs_out)
    try:
        for message in messages:
            here.send(message)
        assert [there.receive(1) for _ in messages] == messages
    finally:
        here.close()
        there.close()


def test_a_message_larger_than_the_pipe_arrives_whole(ends):
    channel, _, theirs_out = ends
    message = {"ns": list(range(200_000))}
    data = json.dumps(message).encode() + b"\n"
    writer = threading.Thread(target=lambda: os.writev(theirs_out, [data]))
    writer.start()
    assert channel.receive(10) == message
    writer.join()


def test_the_end_of_the_stream_is_told_on_either_side(ends):
    channel, theirs_in, theirs_out = ends
    os.write(theirs_out, b'{"half": ')
    os.close(theirs_out)
    with pytest.raises(EndOfStreamError):
        channel.receive(1)
    os.close(theirs_in)
    with pytest.raises(EndOfStreamError):
        channel.send({"op": "turn"})


def test_waiting_takes_no_processor_time(ends):
    channel, _, _ = ends
    before = time.process_time()
    with pytest.raises(DeadlineError):
        channel.receive(0.5)
    assert time.process_time() - before < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The parent's side, against a process that plays the worker


@pytest.fixture
def play(ends):
    """Return a WorkerProcess whose process is ``sleep`` and whose answers are given beforehand."""
    channel, _, theirs_out = ends
    worker = object.__new__(WorkerProcess)
    worker._channel, worker._next, worker.alive = channel, 0, True
    worker._process = subprocess.Popen(["sleep", "60"])

    def answers(*lines):
        for line in lines:
            os.write(theirs_out, line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
        return worker

    yield answers
    worker._process.kill()
    worker._process.wait()


def test_a_reply_is_returned_and_progress_is_told(play):
    told = []
    worker = play({"id": 1, "progress": [1, 2]}, {"id": 1, "progress": [2, 2]}, {"id": 1, "ok": {"x": 1}})
    assert worker.request("run_once", 1, lambda step, of: told.append((step, of))) == {"x": 1}
    assert told == [(1, 2), (2, 2)]


def test_an_error_leaves_the_worker_alive(play):
    worker = play({"id": 1, "error": {"message": "no", "traceback": "where"}}, {"id": 2, "ok": {}})
    with pytest.raises(WorkerError, match="no") as caught:
        worker.request("prepare", 1)
    assert caught.value.traceback == "where"
    assert worker.request("prepare", 1) == {}


@pytest.mark.parametrize(
    ("line", "words"), [(b"no json\n", "was no message"), ({"id": 7, "ok": {}}, "answered out of order")]
)
def test_a_worker_that_answers_nonsense_is_killed(line, words, play):
    worker = play(line)
    with pytest.raises(WorkerDiedError, match=words):
        worker.request("turn", 1)
    assert not worker.alive
    assert worker._process.returncode == -signal.SIGKILL


def test_a_worker_that_does_not_answer_is_killed(play):
    worker = play()
    with pytest.raises(WorkerTimeoutError, match=r"no answer to 'turn' within 0.05 s; the worker was killed"):
        worker.request("turn", 0.05)
    assert worker._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGKILL])
def test_the_cause_of_a_death_is_named(signum, play, ends):
    worker = play()
    worker._process.send_signal(signum)
    os.close(ends[2])
    with pytest.raises(WorkerDiedError, match=f"killed by {signum.name}"):
        worker.request("turn", 1)
    assert not worker.alive
