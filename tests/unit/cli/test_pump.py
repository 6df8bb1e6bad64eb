"""Console bytes through threads: order, full pipes, closed pipes, ends."""

import os
import threading
import time

from trivisor.cli import pump
from trivisor.cli.pump import Reader, Writer


def test_everything_is_written_in_order() -> None:
    reader, writer_end = os.pipe()
    writer = Writer(writer_end, hurry=lambda: False, failed=lambda: None)
    for number in range(1000):
        writer.put(b"%03d" % number)
    writer.close()
    os.close(writer_end)
    with open(reader, "rb") as file:
        assert file.read() == b"".join(b"%03d" % number for number in range(1000))


def test_a_reader_that_does_not_read_holds_the_guest_up_until_it_is_wanted(monkeypatch) -> None:
    monkeypatch.setattr(pump, "OUTPUT_AHEAD", 1000)
    reader, writer_end = os.pipe()
    wanted = threading.Event()
    writer = Writer(writer_end, hurry=wanted.is_set, failed=lambda: None)
    done = threading.Event()

    def print_much() -> None:
        for _ in range(100):
            writer.put(bytes(1000))
        done.set()

    thread = threading.Thread(target=print_much)
    thread.start()
    assert not done.wait(0.2)
    wanted.set()
    assert done.wait(5)
    started = time.monotonic()
    writer.close(0.05)
    assert time.monotonic() - started < 2
    os.close(reader)
    thread.join()


def test_a_closed_pipe_is_told_once_and_drops_the_rest() -> None:
    reader, writer_end = os.pipe()
    os.close(reader)
    failures: list[bool] = []
    failed = threading.Event()

    def on_failure() -> None:
        failures.append(True)
        failed.set()

    writer = Writer(writer_end, hurry=lambda: False, failed=on_failure)
    writer.put(b"x")
    assert failed.wait(5)
    writer.put(b"y")
    writer.close()
    os.close(writer_end)
    assert failures == [True]
    assert isinstance(writer.error, BrokenPipeError)


def test_reading_waits_until_the_guest_has_room() -> None:
    reader_end, writer = os.pipe()
    room, taken, came = threading.Event(), bytearray(), threading.Event()

    def take(data: bytes) -> None:
        taken.extend(data)
        came.set()

    os.write(writer, b"typed")
    reader = Reader(reader_end, take, room.is_set)
    assert not came.wait(0.1)
    room.set()
    assert came.wait(5)
    assert taken == b"typed"
    reader.close()
    os.close(reader_end)
    os.close(writer)


def test_close_ends_a_reader_that_waits_and_one_at_the_end_of_its_file() -> None:
    reader_end, writer = os.pipe()
    waiting = Reader(reader_end, lambda data: None, lambda: True)
    waiting.close()
    os.close(writer)
    at_end = Reader(reader_end, lambda data: None, lambda: True)
    time.sleep(0.02)
    at_end.close()
    os.close(reader_end)
