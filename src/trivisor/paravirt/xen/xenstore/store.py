"""The store itself: reads, writes, transactions and watches, for one domain and for back ends of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from trivisor.machine.saved_values import number
from trivisor.machine.saving import Remembers, Saved
from trivisor.paravirt.xen.xenstore.tree import (
    LONGEST_VALUE,
    Node,
    Permissions,
    StoreError,
    find,
    inherited,
    load_tree,
    put,
    remove,
    save_tree,
    split,
)

MOST_NODES = 1000
"""That a domain may own."""
MOST_TRANSACTIONS = 10

WatchCallback = Callable[[str], None]
"""Called with the path that changed."""


@dataclass(slots=True)
class Transaction:
    """A view of the store of its own, until it is committed."""

    base: Node
    root: Node
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """A wish to hear of changes at `path` and below."""

    path: str
    callback: WatchCallback


class Store(Remembers):
    """Paths are absolute; a domain may do what the nodes' rights allow.  Methods raise StoreError."""

    def __init__(self) -> None:
        self._root = Node(permissions=((0, "r"),))
        self._transactions: dict[int, Transaction] = {}
        self._last_transaction = 0
        self._watches: list[Watch] = []

    @property
    def transactions(self) -> set[int]:
        """The numbers of those that are running."""
        return {*self._transactions}

    def save(self) -> Saved:
        """Nodes and transactions; watches are those of `Connection`."""
        return {
            "nodes": save_tree(self._root),
            "last_transaction": self._last_transaction,
            "transactions": [
                [number, one.base is self._root, one.changed, save_tree(one.root)]
                for number, one in self._transactions.items()
            ],
        }

    def load(self, saved: Saved) -> None:
        self._root = load_tree(saved.get("nodes"))
        self._last_transaction = number(saved.get("last_transaction"), "last_transaction", 32)
        running = saved.get("transactions")
        if not isinstance(running, list) or len(running) > MOST_TRANSACTIONS:
            raise ValueError("there are no transactions")
        self._transactions = dict(self._load_transaction(row) for row in running)

    def _load_transaction(self, row: Any) -> tuple[int, Transaction]:
        if not isinstance(row, list) or len(row) != 4 or not isinstance(row[2], list):
            raise ValueError("a transaction is none")
        at, is_current, changed, nodes = row
        try:
            for path in changed:
                split(path)
        except (StoreError, AttributeError):
            raise ValueError("a transaction has changed what is no path") from None
        base = self._root if is_current is True else Node()
        return number(at, "transaction", 32), Transaction(base, load_tree(nodes), changed)

    # -- reading --------------------------------------------------------------------------------------------

    def _root_of(self, transaction: int) -> Node:
        return self._transaction(transaction).root if transaction else self._root

    def _transaction(self, number: int) -> Transaction:
        found = self._transactions.get(number)
        if found is None:
            raise StoreError("ENOENT")
        return found

    def node(self, path: str, domain: int = 0, transaction: int = 0) -> Node:
        """The node at a path that the domain may read; ENOENT, EACCES."""
        found = find(self._root_of(transaction), path)
        if found is None:
            raise StoreError("ENOENT")
        if not found.allows(domain, "r"):
            raise StoreError("EACCES")
        return found

    def read(self, path: str) -> str | None:
        """A value as text, for back ends; None for a node that is not there."""
        found = find(self._root, path)
        return None if found is None else found.value.decode("utf-8", "replace")

    # -- writing --------------------------------------------------------------------------------------------

    def write(self, path: str, value: bytes | str, domain: int = 0, transaction: int = 0) -> None:
        """Set a value; nodes on the way are made."""
        data = value.encode() if isinstance(value, str) else value
        if len(data) > LONGEST_VALUE and domain:
            raise StoreError("ENOSPC")
        self._put(path, domain, transaction, lambda node: replace(node, value=data))

    def make(self, path: str, domain: int = 0, transaction: int = 0) -> None:
        """Make a node if it is not there."""
        if find(self._root_of(transaction), path) is None:
            self._put(path, domain, transaction, lambda node: node)

    def set_permissions(self, path: str, permissions: Permissions, domain: int = 0, transaction: int = 0) -> None:
        """Change who may do what; for the owner, who stays the owner unless domain 0 does it."""
        found = find(self._root_of(transaction), path)
        if found is None:
            raise StoreError("ENOENT")
        if domain not in (0, found.owner) or (domain and permissions[0][0] != domain):
            raise StoreError("EACCES" if domain != found.owner else "EPERM")
        self._put(path, domain, transaction, lambda node: replace(node, permissions=permissions))

    def _put(self, path: str, domain: int, transaction: int, change: Callable[[Node], Node]) -> None:
        names = split(path)
        root = self._root_of(transaction)
        there = find(root, path)
        if there is None:
            parent, missing = self._nearest(root, names)
            if not parent.allows(domain, "w"):
                raise StoreError("EACCES")
            if domain and root.count(domain) + missing > MOST_NODES:
                raise StoreError("ENOSPC")
            there = Node(permissions=inherited(parent, domain))
        elif not there.allows(domain, "w"):
            raise StoreError("EACCES")
        self._replace(put(root, names, change(there), domain), path, transaction)

    @staticmethod
    def _nearest(root: Node, names: list[str]) -> tuple[Node, int]:
        """The last node along a path that is there, and how many are missing after it."""
        node = root
        for depth, name in enumerate(names):
            child = node.children.get(name)
            if child is None:
                return node, len(names) - depth
            node = child
        return node, 0

    def remove(self, path: str, domain: int = 0, transaction: int = 0) -> None:
        """Remove a node and all below it; nothing happens if only it is missing, ENOENT if its parent is too."""
        names = split(path)
        if not names:
            raise StoreError("EINVAL")
        root = self._root_of(transaction)
        found = find(root, path)
        if found is None:
            if len(names) > 1 and find(root, "/" + "/".join(names[:-1])) is None:
                raise StoreError("ENOENT")
            return
        if not found.allows(domain, "w"):
            raise StoreError("EACCES")
        self._replace(remove(root, names), path, transaction)

    def _replace(self, root: Node, path: str, transaction: int) -> None:
        if transaction:
            running = self._transaction(transaction)
            running.root = root
            running.changed.append(path)
        else:
            self._root = root
            self._fire(path)

    # -- transactions ---------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Start a transaction; its number."""
        if len(self._transactions) >= MOST_TRANSACTIONS:
            raise StoreError("ENOSPC")
        self._last_transaction = self._last_transaction % 0xFFFFFFFE + 1
        while self._last_transaction in self._transactions:
            self._last_transaction += 1
        self._transactions[self._last_transaction] = Transaction(self._root, self._root)
        return self._last_transaction

    def end(self, number: int, commit: bool) -> None:
        """Finish one; EAGAIN when it was to be committed and the store has changed since it began."""
        running = self._transaction(number)
        del self._transactions[number]
        if not commit or not running.changed:
            return
        if running.base is not self._root:
            raise StoreError("EAGAIN")
        self._root = running.root
        for path in dict.fromkeys(running.changed):
            self._fire(path)

    # -- watches --------------------------------------------------------------------------------------------

    def watch(self, path: str, callback: WatchCallback) -> Watch:
        """Have `callback(path)` called now and for every change at `path` or below."""
        made = Watch(path, callback)
        self._watches.append(made)
        callback(path)
        return made

    def unwatch(self, watch: Watch) -> None:
        """End it."""
        self._watches.remove(watch)

    def _fire(self, path: str) -> None:
        """Tell of a change; a removed node's watches below it hear of their own paths."""
        for watch in list(self._watches):
            if watch.path == path or watch.path == "/" or path.startswith(watch.path + "/"):
                watch.callback(path)
            elif watch.path.startswith(path + "/") and find(self._root, watch.path) is None:
                watch.callback(watch.path)
