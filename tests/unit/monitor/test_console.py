"""The console's bytes: patterns over pieces, bounded memory, input in order."""

import re
import threading

from trivisor.monitor import console
from trivisor.monitor.console import Console, compile_pattern


def fed(*pieces: bytes) -> Console:
    made = Console()
    for piece in pieces:
        made.feed(piece)
    return made


def test_consume_returns_all_up_to_the_end_of_the_match_and_goes_on_from_there() -> None:
    made = fed(b"one two one two")
    two = compile_pattern("two")
    assert made.consume(two) == b"one two"
    assert made.consume(two) == b" one two"
    assert made.consume(two) is None


def test_a_match_may_come_in_pieces() -> None:
    made = Console()
    made.watch(compile_pattern("login:"))
    assert [made.feed(bytes([byte])) for byte in b"a login: b"].index(True) == len(b"a login:") - 1


def test_a_string_is_taken_literally_and_an_expression_is_not() -> None:
    made = fed(b"aXc a.c")
    assert made.consume(compile_pattern("a.c")) == b"aXc a.c"
    assert fed(b"aXc a.c").consume(re.compile(rb"a.c")) == b"aXc"


def test_nothing_is_found_when_nothing_is_watched() -> None:
    made = Console()
    assert not made.feed(b"login:")


def test_what_consume_gave_out_is_not_matched_again() -> None:
    made = fed(b"# ")
    prompt = compile_pattern("# ")
    assert made.consume(prompt) == b"# "
    made.watch(prompt)
    assert not made.feed(b"ls\r\n")
    assert made.feed(b"# ")


def test_output_is_bounded_and_keeps_the_newest(monkeypatch) -> None:
    monkeypatch.setattr(console, "OUTPUT_LIMIT", 100)
    made = Console()
    for number in range(1000):
        made.feed(b"%03d" % number)
        assert len(made.output) <= 100
    assert made.output.endswith(b"997998999")
    assert made.consume(compile_pattern("998999")) == made.output


def test_input_comes_out_in_order_and_once() -> None:
    made = Console()
    made.write(b"a")
    made.write(b"bc")
    assert made.take_input() == b"abc"
    assert made.take_input() == b""


def test_wait_ends_when_the_watched_pattern_comes() -> None:
    made = Console()
    made.watch(compile_pattern("x"))
    writer = threading.Timer(0.02, made.feed, [b"x"])
    writer.start()
    made.wait(10)
    assert made.consume(compile_pattern("x")) == b"x"
    writer.join()
