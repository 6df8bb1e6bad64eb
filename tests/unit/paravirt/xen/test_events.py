"""Event channels of the 2-level kind against the rules of event_channel.h and xen.h."""

from __future__ import annotations

import pytest

from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.abi import EEXIST, EINVAL, ENOENT, ENOSYS, EPERM, ESRCH

A = 0x10000


def op(guest, command: int) -> int:
    return guest.call("event_channel_op", command, A)


def ipi(guest) -> int:
    guest.put("<II", 0, 0)
    assert op(guest, abi.EVTCHNOP_BIND_IPI) == 0
    return guest.get("<II")[1]


def pending(guest, port: int) -> int:
    view, base = guest.domain.view, guest.domain.own.shared_info << 12
    return view[base + abi.SHARED_EVTCHN_PENDING + port // 8] >> port % 8 & 1


def mask(guest, port: int) -> None:
    guest.domain.view[(guest.domain.own.shared_info << 12) + abi.SHARED_EVTCHN_MASK + port // 8] |= 1 << port % 8


def info(guest) -> tuple[int, int, int]:
    """(pending, mask, selector) of the processor."""
    view, at = guest.domain.view, guest.events.vcpu_info
    return view[at], view[at + 1], int.from_bytes(view[at + 8 : at + 16], "little")


def send(guest, port: int) -> int:
    guest.put("<I", port)
    return op(guest, abi.EVTCHNOP_SEND)


def test_an_event_sets_its_bit_the_selector_and_the_upcall(guest) -> None:
    port = ipi(guest)
    assert send(guest, port) == 0
    assert pending(guest, port) and info(guest) == (1, 0, 1)
    assert guest.events.pending()


def test_the_upcall_mask_holds_the_interrupt_back(guest) -> None:
    port = ipi(guest)
    guest.domain.view[guest.events.vcpu_info + 1] = 1
    send(guest, port)
    assert info(guest)[0] == 1 and not guest.events.pending()


def test_a_masked_event_is_pending_and_no_more_until_it_is_unmasked(guest) -> None:
    port = ipi(guest)
    mask(guest, port)
    send(guest, port)
    assert pending(guest, port) and info(guest) == (0, 0, 0)
    guest.put("<I", port)
    assert op(guest, abi.EVTCHNOP_UNMASK) == 0
    assert info(guest) == (1, 0, 1)


def test_ports_in_the_second_word_have_their_own_selector_bit(guest) -> None:
    ports = [ipi(guest) for _ in range(70)]
    send(guest, ports[-1])
    assert info(guest)[2] == 1 << (ports[-1] >> 6) != 1


def test_a_virq_is_bound_once_and_global_ones_are_not_for_this_domain(guest) -> None:
    guest.put("<II", abi.VIRQ_TIMER, 0)
    assert op(guest, abi.EVTCHNOP_BIND_VIRQ) == 0
    port = guest.get("<III")[2]
    assert op(guest, abi.EVTCHNOP_BIND_VIRQ) == -EEXIST
    guest.events.raise_virq(abi.VIRQ_TIMER)
    assert pending(guest, port)
    assert send(guest, port) == -EINVAL, "nobody sends on a virtual interrupt's port"
    for virq, error in ((2, EPERM), (99, EINVAL)):
        guest.put("<II", virq, 0)
        assert op(guest, abi.EVTCHNOP_BIND_VIRQ) == -error
    guest.put("<II", 1, 1)
    assert op(guest, abi.EVTCHNOP_BIND_VIRQ) == -ENOENT, "there is one processor"


def test_a_closed_port_can_be_had_again(guest) -> None:
    port = ipi(guest)
    send(guest, port)
    guest.put("<I", port)
    assert op(guest, abi.EVTCHNOP_CLOSE) == 0
    assert op(guest, abi.EVTCHNOP_CLOSE) == -EINVAL
    assert send(guest, port) == -EINVAL
    assert ipi(guest) == port and not pending(guest, port)


def test_a_back_end_hears_of_events_and_answers(guest) -> None:
    heard: list[int] = []
    guest.put("<HH", abi.DOMID_SELF, 0)
    assert op(guest, abi.EVTCHNOP_ALLOC_UNBOUND) == 0
    port = guest.get("<HHI")[2]
    assert send(guest, port) == 0, "lost, but no error, while nobody is there"
    guest.events.bind_back_end(port, lambda: heard.append(port))
    with pytest.raises(ValueError):
        guest.events.bind_back_end(port, lambda: None)
    send(guest, port)
    assert heard == [port]


def test_two_ports_of_the_domain_joined(guest) -> None:
    guest.put("<HH", abi.DOMID_SELF, abi.DOMID_SELF)
    op(guest, abi.EVTCHNOP_ALLOC_UNBOUND)
    first = guest.get("<HHI")[2]
    guest.put("<HHI", abi.DOMID_SELF, 0, first)
    assert op(guest, abi.EVTCHNOP_BIND_INTERDOMAIN) == 0
    second = guest.get("<HHII")[3]
    send(guest, second)
    assert pending(guest, first)
    guest.put("<HHI", 0, 0, first)
    assert op(guest, abi.EVTCHNOP_BIND_INTERDOMAIN) == -ESRCH


def test_who_waits_for_whom(guest) -> None:
    """A port that waits for another domain is not the domain's own to bind, and the two ends know one another."""
    guest.put("<HH", abi.DOMID_SELF, 0)
    op(guest, abi.EVTCHNOP_ALLOC_UNBOUND)
    foreign = guest.get("<HHI")[2]
    for port in (foreign, ipi(guest), 4095, 0xFFFFFFFF):
        guest.put("<HHI", abi.DOMID_SELF, 0, port)
        assert op(guest, abi.EVTCHNOP_BIND_INTERDOMAIN) == -EINVAL
    guest.put("<HH", abi.DOMID_SELF, abi.DOMID_SELF)
    op(guest, abi.EVTCHNOP_ALLOC_UNBOUND)
    first = guest.get("<HHI")[2]
    guest.put("<HHI", abi.DOMID_SELF, 0, first)
    assert op(guest, abi.EVTCHNOP_BIND_INTERDOMAIN) == 0
    second = guest.get("<HHII")[3]
    for port, other in ((first, second), (second, first)):
        guest.put("<HHI", abi.DOMID_SELF, 0, port)
        assert op(guest, abi.EVTCHNOP_STATUS) == 0
        assert guest.get("<8xIIHHI") == (abi.EVTCHNSTAT_INTERDOMAIN, 0, guest.domain.number, 0, other)
    guest.put("<I", first)
    assert op(guest, abi.EVTCHNOP_CLOSE) == 0
    guest.put("<HHI", abi.DOMID_SELF, 0, second)
    assert op(guest, abi.EVTCHNOP_STATUS) == 0
    assert guest.get("<8xIIH") == (abi.EVTCHNSTAT_UNBOUND, 0, guest.domain.number)


def test_status(guest) -> None:
    port = ipi(guest)
    guest.put("<HHI", abi.DOMID_SELF, 0, port)
    assert op(guest, abi.EVTCHNOP_STATUS) == 0
    assert guest.get("<HHIII")[3] == abi.EVTCHNSTAT_IPI
    guest.put("<HHI", abi.DOMID_SELF, 0, 4095)
    op(guest, abi.EVTCHNOP_STATUS)
    assert guest.get("<HHIII")[3] == abi.EVTCHNSTAT_CLOSED
    guest.put("<HHI", abi.DOMID_SELF, 0, 1 << 20)
    assert op(guest, abi.EVTCHNOP_STATUS) == -EINVAL


def test_the_fifo_kind_is_not_there(guest) -> None:
    for frame, offset, vcpu, error in (
        (guest.frame(), 0, 0, ENOSYS), ((1 << 64) - 2, 0, 0, EINVAL), (guest.frame(), 4, 0, EINVAL),
        (guest.frame(), 4032, 0, EINVAL), (guest.frame(), 0, 1, ENOENT),
    ):  # fmt: skip
        guest.put("<QII", frame, offset, vcpu)
        assert op(guest, abi.EVTCHNOP_INIT_CONTROL) == -error
    assert op(guest, abi.EVTCHNOP_EXPAND_ARRAY) == -ENOSYS


def test_a_poll_ends_with_an_event_that_is_masked(guest) -> None:
    port = ipi(guest)
    mask(guest, port)
    guest.put("<I", port, at=A + 64)
    guest.put("<QIIQ", A + 64, 1, 0, 0)
    assert guest.call("sched_op", abi.SCHEDOP_POLL, A) == 0
    assert guest.domain.halt is not None and not guest.events.pending()
    guest.events.set_pending(port)
    assert guest.events.pending() and not guest.events.upcall_wanted()
    guest.domain.halt = None
    assert guest.call("sched_op", abi.SCHEDOP_POLL, A) == 0
    assert guest.domain.halt is None, "it was pending already"


def test_bad_ports_and_addresses(guest) -> None:
    for command in range(14):
        assert guest.call("event_channel_op", command, 0xDEAD0000) in (-14, -ENOSYS, -EPERM)
        guest.put("<4Q", *([(1 << 64) - 1] * 4))
        assert op(guest, command) < 0
