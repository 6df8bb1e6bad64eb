"""The store's requests as they come over the wire, for one domain (io/xs_wire.h; docs/misc/xenstore.txt)."""

from __future__ import annotations

import struct
from collections.abc import Callable

from trivisor.machine.saved_values import number_list
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.xenstore.store import Store, Watch
from trivisor.paravirt.xen.xenstore.tree import RIGHTS, Permissions, StoreError, split

HEADER = struct.Struct("<4I")
"""Type, request id, transaction id, length of what follows."""
LONGEST_PAYLOAD = 4096
MOST_WATCHES = 128
_LONGEST_TOKEN = 256

(
    CONTROL, DIRECTORY, READ, GET_PERMS, WATCH, UNWATCH, TRANSACTION_START, TRANSACTION_END, INTRODUCE, RELEASE,
    GET_DOMAIN_PATH, WRITE, MKDIR, RM, SET_PERMS, WATCH_EVENT, ERROR, IS_DOMAIN_INTRODUCED, RESUME, SET_TARGET,
    _20, RESET_WATCHES, DIRECTORY_PART,
) = range(23)  # fmt: skip


class Connection(Remembers):
    """One domain's connection: requests in, replies and watch events out through `send(message)`."""

    def __init__(self, store: Store, domain: int, send: Callable[[bytes], None]) -> None:
        self._store = store
        self._domain = domain
        self._home = f"/local/domain/{domain}"
        self._send = send
        self._watches: dict[tuple[str, str], Watch] = {}
        self._own_transactions: set[int] = set()
        self._handlers: dict[int, Callable[[int, bytes], bytes]] = {
            DIRECTORY: self._directory,
            DIRECTORY_PART: self._directory_part,
            READ: self._read,
            GET_PERMS: self._get_permissions,
            WATCH: self._watch,
            UNWATCH: self._unwatch,
            TRANSACTION_START: self._start,
            TRANSACTION_END: self._end,
            GET_DOMAIN_PATH: self._domain_path,
            WRITE: self._write,
            MKDIR: self._make,
            RM: self._remove,
            SET_PERMS: self._set_permissions,
            IS_DOMAIN_INTRODUCED: self._is_introduced,
            RESET_WATCHES: self._reset_watches,
            INTRODUCE: _forbidden,
            RELEASE: _forbidden,
            RESUME: _forbidden,
            SET_TARGET: _forbidden,
            CONTROL: _forbidden,
        }

    def save(self) -> Saved:
        return {"watches": [[*watch] for watch in self._watches], "transactions": sorted(self._own_transactions)}

    def load(self, saved: Saved) -> None:
        """Once the store has its nodes and transactions; ValueError for what the domain could not have asked for."""
        watches = saved.get("watches")
        if not isinstance(watches, list) or len(watches) > MOST_WATCHES:
            raise ValueError("there are no watches")
        try:
            for words in watches:
                if not isinstance(words, list) or len(words) != 2 or not all(isinstance(word, str) for word in words):
                    raise ValueError("there is no such watch")
                self._watch(0, "".join(f"{word}\0" for word in words).encode())
        except StoreError as error:
            raise ValueError(f"there is no such watch: {error}") from None
        self._own_transactions = {*number_list(saved, "transactions", 32)}
        if not self._own_transactions <= self._store.transactions:
            raise ValueError("there are no such transactions")

    def request(self, kind: int, number: int, transaction: int, payload: bytes) -> None:
        """Serve one request."""
        handler = self._handlers.get(kind)
        try:
            if handler is None:
                raise StoreError("ENOSYS")
            if transaction and transaction not in self._own_transactions:
                raise StoreError("ENOENT")
            reply = handler(transaction, payload)
            if len(reply) > LONGEST_PAYLOAD:
                raise StoreError("E2BIG")
        except StoreError as error:
            kind, reply = ERROR, str(error).encode() + b"\0"
        self._send(HEADER.pack(kind, number, transaction, len(reply)) + reply)
        if kind == WATCH:
            # The first event comes after the reply.
            path, token = _strings(payload, 2)
            self._send_event(path, token)

    def close(self) -> None:
        """The domain is gone: so are its watches and transactions."""
        self._reset_watches(0, b"")
        for number in self._own_transactions:
            self._store.end(number, False)
        self._own_transactions.clear()

    # -- requests; each takes the transaction and the payload, and returns the reply's ----------------------

    def _path(self, name: str) -> str:
        """An absolute path; a relative one is the domain's own."""
        path = name if name.startswith(("/", "@")) else f"{self._home}/{name}"
        if not path.startswith("@"):
            split(path)
        return path

    def _directory(self, transaction: int, payload: bytes) -> bytes:
        (name,) = _strings(payload, 1)
        node = self._store.node(self._path(name), self._domain, transaction)
        return b"".join(child.encode() + b"\0" for child in node.children)

    def _directory_part(self, transaction: int, payload: bytes) -> bytes:
        """A piece of a long directory from an offset on; the generation is always the same one."""
        name, offset = _strings(payload, 2)
        node = self._store.node(self._path(name), self._domain, transaction)
        names = b"".join(child.encode() + b"\0" for child in node.children) + b"\0"
        if not offset.isdigit() or int(offset) >= len(names):
            raise StoreError("EINVAL")
        generation = b"%d\0" % (hash(names) & 0xFFFF_FFFF)
        return generation + names[int(offset) :][: LONGEST_PAYLOAD - len(generation)]

    def _read(self, transaction: int, payload: bytes) -> bytes:
        (name,) = _strings(payload, 1)
        return self._store.node(self._path(name), self._domain, transaction).value

    def _write(self, transaction: int, payload: bytes) -> bytes:
        name, separator, value = payload.partition(b"\0")
        if not separator:
            raise StoreError("EINVAL")
        self._store.write(self._path(_text(name)), value, self._domain, transaction)
        return b"OK\0"

    def _make(self, transaction: int, payload: bytes) -> bytes:
        (name,) = _strings(payload, 1)
        self._store.make(self._path(name), self._domain, transaction)
        return b"OK\0"

    def _remove(self, transaction: int, payload: bytes) -> bytes:
        (name,) = _strings(payload, 1)
        self._store.remove(self._path(name), self._domain, transaction)
        return b"OK\0"

    def _get_permissions(self, transaction: int, payload: bytes) -> bytes:
        (name,) = _strings(payload, 1)
        node = self._store.node(self._path(name), self._domain, transaction)
        return b"".join(f"{mode}{domain}".encode() + b"\0" for domain, mode in node.permissions)

    def _set_permissions(self, transaction: int, payload: bytes) -> bytes:
        name, *words = _strings(payload, None)
        if not words:
            raise StoreError("EINVAL")
        self._store.set_permissions(self._path(name), _permissions(words), self._domain, transaction)
        return b"OK\0"

    def _start(self, transaction: int, payload: bytes) -> bytes:
        if transaction:
            raise StoreError("EBUSY")
        number = self._store.begin()
        self._own_transactions.add(number)
        return b"%d\0" % number

    def _end(self, transaction: int, payload: bytes) -> bytes:
        (answer,) = _strings(payload, 1)
        if not transaction or answer not in ("T", "F"):
            raise StoreError("EINVAL")
        self._own_transactions.discard(transaction)
        self._store.end(transaction, answer == "T")
        return b"OK\0"

    def _domain_path(self, transaction: int, payload: bytes) -> bytes:
        (number,) = _strings(payload, 1)
        if not number.isdigit():
            raise StoreError("EINVAL")
        return f"/local/domain/{int(number)}".encode() + b"\0"

    def _is_introduced(self, transaction: int, payload: bytes) -> bytes:
        (number,) = _strings(payload, 1)
        return b"T\0" if number in ("0", str(self._domain)) else b"F\0"

    # -- watches --------------------------------------------------------------------------------------------

    def _watch(self, transaction: int, payload: bytes) -> bytes:
        name, token = _strings(payload, 2)
        path = self._path(name)
        if (name, token) in self._watches:
            raise StoreError("EEXIST")
        if len(self._watches) >= MOST_WATCHES or len(token) > _LONGEST_TOKEN:
            raise StoreError("ENOSPC")
        first = True

        def changed(where: str) -> None:
            nonlocal first
            if first:
                first = False
                return
            if not name.startswith(("/", "@")):
                where = where.removeprefix(self._home + "/")
            self._send_event(where, token)

        self._watches[name, token] = self._store.watch(path, changed)
        return b"OK\0"

    def _unwatch(self, transaction: int, payload: bytes) -> bytes:
        name, token = _strings(payload, 2)
        watch = self._watches.pop((name, token), None)
        if watch is None:
            raise StoreError("ENOENT")
        self._store.unwatch(watch)
        return b"OK\0"

    def _reset_watches(self, transaction: int, payload: bytes) -> bytes:
        for watch in self._watches.values():
            self._store.unwatch(watch)
        self._watches.clear()
        return b"OK\0"

    def _send_event(self, path: str, token: str) -> None:
        payload = path.encode() + b"\0" + token.encode() + b"\0"
        self._send(HEADER.pack(WATCH_EVENT, 0, 0, len(payload)) + payload)


def _forbidden(transaction: int, payload: bytes) -> bytes:
    raise StoreError("EACCES")


def _text(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise StoreError("EINVAL") from None


def _strings(payload: bytes, count: int | None) -> list[str]:
    """The zero-terminated strings of a payload; EINVAL unless there are `count` (the last may lack its zero)."""
    parts = payload.removesuffix(b"\0").split(b"\0")
    if count is not None and len(parts) > count:
        parts = parts[:count]  # what follows is padding
    if count is not None and len(parts) != count:
        raise StoreError("EINVAL")
    return [_text(part) for part in parts]


def _permissions(words: list[str]) -> Permissions:
    found = []
    for word in words:
        if word[:1] not in RIGHTS or not word[1:].isdigit() or int(word[1:]) > 0x7FFF:
            raise StoreError("EINVAL")
        found.append((int(word[1:]), word[0]))
    return tuple(found)
