"""A network of the guest's own behind this process: libslirp, which QEMU uses for it too.

Its router is 10.0.2.2, which is the host's loopback as well, its name server
10.0.2.3, and it leases 10.0.2.15 by DHCP.  Outgoing TCP and UDP become
sockets of this process; ports of the host's loopback can be forwarded in.
IPv4 alone.  One thread does it all, since libslirp is for one thread.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

_LIBRARY = "libslirp.so.0"
LONGEST_FRAME = 65535
MTU = 65520
"""What the network takes in one packet; the guest's own MTU is what counts for TCP."""
_MOST_WAITING = 1024
"""Frames of the guest's that wait for the thread; those that come then are lost."""
_FOREVER = 0xFFFFFFFF
_IN, _OUT, _PRI, _ERR, _HUP = 1, 2, 4, 8, 16
_EVENTS = (
    (_IN, select.POLLIN), (_OUT, select.POLLOUT), (_PRI, select.POLLPRI), (_ERR, select.POLLERR), (_HUP, select.POLLHUP)
)  # fmt: skip
_HEADER_SIZE = 14

_Send = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_Complain = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)
_Now = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_Descriptor = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
_Notify = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_AddPoll = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_GetEvents = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


class NetworkUnavailable(RuntimeError):
    """The host lacks what the network needs; the message is one line for the user."""


class _Address(ctypes.Structure):
    """struct in_addr."""

    _fields_ = (("in_network_order", ctypes.c_uint32),)

    def __init__(self, text: str = "0.0.0.0") -> None:
        super().__init__(int.from_bytes(socket.inet_aton(text), "little"))


class _Configuration(ctypes.Structure):
    """struct SlirpConfig, version 1 (libslirp.h)."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("restricted", ctypes.c_int),
        ("in_enabled", ctypes.c_bool),
        ("vnetwork", _Address),
        ("vnetmask", _Address),
        ("vhost", _Address),
        ("in6_enabled", ctypes.c_bool),
        ("vprefix_addr6", ctypes.c_uint32 * 4),
        ("vprefix_len", ctypes.c_uint8),
        ("vhost6", ctypes.c_uint32 * 4),
        ("vhostname", ctypes.c_char_p),
        ("tftp_server_name", ctypes.c_char_p),
        ("tftp_path", ctypes.c_char_p),
        ("bootfile", ctypes.c_char_p),
        ("vdhcp_start", _Address),
        ("vnameserver", _Address),
        ("vnameserver6", ctypes.c_uint32 * 4),
        ("vdnssearch", ctypes.c_void_p),
        ("vdomainname", ctypes.c_char_p),
        ("if_mtu", ctypes.c_size_t),
        ("if_mru", ctypes.c_size_t),
        ("disable_host_loopback", ctypes.c_bool),
        ("enable_emu", ctypes.c_bool),
    )


class _Callbacks(ctypes.Structure):
    """struct SlirpCb; timers are for IPv6 alone."""

    _fields_ = (
        ("send_packet", _Send),
        ("guest_error", _Complain),
        ("clock_get_ns", _Now),
        ("timer_new", ctypes.c_void_p),
        ("timer_free", ctypes.c_void_p),
        ("timer_mod", ctypes.c_void_p),
        ("register_poll_fd", _Descriptor),
        ("unregister_poll_fd", _Descriptor),
        ("notify", _Notify),
        ("init_completed", ctypes.c_void_p),
        ("timer_new_opaque", ctypes.c_void_p),
    )


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY, use_errno=True)
    except OSError:
        raise NetworkUnavailable(f"a user-mode network needs {_LIBRARY}: sudo apt-get install libslirp0") from None
    library.slirp_new.restype = ctypes.c_void_p
    library.slirp_new.argtypes = [ctypes.POINTER(_Configuration), ctypes.POINTER(_Callbacks), ctypes.c_void_p]
    library.slirp_cleanup.argtypes = [ctypes.c_void_p]
    library.slirp_pollfds_fill.argtypes = [
        ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32), _AddPoll, ctypes.c_void_p,
    ]  # fmt: skip
    library.slirp_pollfds_poll.argtypes = [ctypes.c_void_p, ctypes.c_int, _GetEvents, ctypes.c_void_p]
    library.slirp_input.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    library.slirp_add_hostfwd.argtypes = [
        ctypes.c_void_p, ctypes.c_int, _Address, ctypes.c_int, _Address, ctypes.c_int,
    ]  # fmt: skip
    return library


class UserNetwork:
    """`deliver(frame)` is called, in the network's thread, with each Ethernet frame for the guest.

    `forwards` are pairs of a port of the host's loopback and one of the
    guest's, TCP.  Raises NetworkUnavailable, and OSError for a port that is taken.
    """

    def __init__(self, deliver: Callable[[bytes], None], forwards: Sequence[tuple[int, int]] = ()) -> None:
        self._library = _library()
        self._deliver = deliver
        self._outgoing: deque[bytes] = deque()
        self._closing = False
        self._lost = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._callbacks = _Callbacks(
            send_packet=_Send(self._send_packet),
            guest_error=_Complain(lambda message, opaque: None),
            clock_get_ns=_Now(lambda opaque: time.monotonic_ns()),
            register_poll_fd=_Descriptor(lambda descriptor, opaque: None),
            unregister_poll_fd=_Descriptor(lambda descriptor, opaque: None),
            notify=_Notify(lambda opaque: self._wake_up()),
        )
        configuration = _Configuration(
            version=1, in_enabled=True,
            vnetwork=_Address("10.0.2.0"), vnetmask=_Address("255.255.255.0"), vhost=_Address("10.0.2.2"),
            vdhcp_start=_Address("10.0.2.15"), vnameserver=_Address("10.0.2.3"), if_mtu=MTU, if_mru=MTU,
        )  # fmt: skip
        self._slirp = self._library.slirp_new(ctypes.byref(configuration), ctypes.byref(self._callbacks), None)
        if not self._slirp:
            os.close(self._wake)
            raise NetworkUnavailable(f"{_LIBRARY} makes no network")
        try:
            for host, guest in forwards:
                self._forward(host, guest)
        except OSError:
            self._clean_up()
            raise
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    def _forward(self, host: int, guest: int) -> None:
        # The guest's address is left to libslirp: the one that it leases.
        failed = self._library.slirp_add_hostfwd(self._slirp, 0, _Address("127.0.0.1"), host, _Address(), guest)
        if failed:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), f"port {host} of the host")

    # -- for the guest's side, from any thread --------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """An Ethernet frame of the guest's, of at most `LONGEST_FRAME` bytes."""
        if len(self._outgoing) >= _MOST_WAITING:
            self._lost += 1
            return
        self._outgoing.append(frame)
        self._wake_up()

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)

    @property
    def lost(self) -> int:
        """How many of the guest's frames came too fast."""
        return self._lost

    def close(self) -> None:
        """End all connections and the thread; harmless the second time."""
        if not self._closing:
            self._closing = True
            self._wake_up()
            self._thread.join()
            self._clean_up()

    def _clean_up(self) -> None:
        self._library.slirp_cleanup(self._slirp)
        os.close(self._wake)

    # -- the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        library, slirp, outgoing = self._library, self._slirp, self._outgoing
        descriptors: list[int] = []
        wanted: dict[int, int] = {}
        ready: dict[int, int] = {}

        def add_poll(descriptor: int, events: int, _opaque: object) -> int:
            wanted[descriptor] = wanted.get(descriptor, 0) | _translate(events, 0, 1)
            descriptors.append(descriptor)
            return len(descriptors) - 1

        def get_events(index: int, _opaque: object) -> int:
            return _translate(ready.get(descriptors[index], 0), 1, 0)

        add, get = _AddPoll(add_poll), _GetEvents(get_events)
        while not self._closing:
            while outgoing:
                frame = outgoing.popleft()
                library.slirp_input(slirp, frame, len(frame))
            descriptors.clear()
            wanted.clear()
            timeout = ctypes.c_uint32(_FOREVER)
            library.slirp_pollfds_fill(slirp, ctypes.byref(timeout), add, None)
            poll = select.poll()
            for descriptor, events in wanted.items():
                poll.register(descriptor, events)
            poll.register(self._wake, select.POLLIN)
            ready = dict(poll.poll(None if timeout.value == _FOREVER else timeout.value))
            if ready.pop(self._wake, 0):
                os.eventfd_read(self._wake)
            library.slirp_pollfds_poll(slirp, 0, get, None)

    def _send_packet(self, data: int, length: int, _opaque: object) -> int:
        if length >= _HEADER_SIZE:
            self._deliver(ctypes.string_at(data, length))
        return length


def _translate(events: int, source: int, target: int) -> int:
    """libslirp's events (0) as poll(2)'s (1), or the other way round."""
    return sum(pair[target] for pair in _EVENTS if events & pair[source])
