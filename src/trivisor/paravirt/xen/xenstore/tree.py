"""The store's tree: immutable nodes, so that a transaction is a root of its own and a snapshot costs nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trivisor.machine.saved_values import number

Permissions = tuple[tuple[int, str], ...]
"""(domain, one of n, r, w, b): the first is the owner and what everybody else may; then single domains."""

RIGHTS = ("n", "r", "w", "b")
_RIGHT = re.compile("[nrwb][0-9]{1,5}")
LONGEST_VALUE = 2048
LONGEST_PATH = 3072
_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-/_@+:.,")


class StoreError(Exception):
    """A request that fails; the text is the error's name, as it goes over the wire."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node with its value, its rights and what is below it."""

    value: bytes = b""
    permissions: Permissions = ((0, "n"),)
    children: Mapping[str, Node] = field(default_factory=dict)

    @property
    def owner(self) -> int:
        return self.permissions[0][0]

    def allows(self, domain: int, right: str) -> bool:
        """Whether a domain may read ("r") or write ("w") here; domain 0 and the owner may do all."""
        if domain in (0, self.owner):
            return True
        granted = next((mode for who, mode in self.permissions[1:] if who == domain), self.permissions[0][1])
        return granted in ("b", right)

    def with_children(self, children: Mapping[str, Node]) -> Node:
        """The same node with other nodes below."""
        return Node(self.value, self.permissions, children)

    def count(self, owner: int) -> int:
        """How many nodes here and below are a domain's."""
        found, rest = 0, [self]
        while rest:
            node = rest.pop()
            found += node.owner == owner
            rest += node.children.values()
        return found


def save_tree(root: Node) -> list[list[Any]]:
    """As rows of [row of the parent, name, value, rights]; the root is the first, and its own parent."""
    rows: list[list[Any]] = []
    waiting = [(0, "", root)]
    while waiting:
        parent, name, node = waiting.pop()
        rights = [f"{mode}{domain}" for domain, mode in node.permissions]
        waiting += [(len(rows), below, child) for below, child in reversed([*node.children.items()])]
        rows.append([parent, name, node.value.hex(), rights])
    return rows


def load_tree(rows: Any) -> Node:
    """The root of the tree that `save_tree` gave; ValueError for what is none."""
    if not isinstance(rows, list) or not rows:
        raise ValueError("the store is missing")
    made: list[tuple[dict[str, Node], int]] = []
    root = Node()
    for at, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 4:
            raise ValueError("a node of the store is none")
        parent, name, value, rights = row
        if not (isinstance(name, str) and isinstance(value, str) and isinstance(rights, list) and rights):
            raise ValueError("a node of the store is none")
        children: dict[str, Node] = {}
        node = Node(bytes.fromhex(value), tuple(_right(word) for word in rights), children)
        if len(node.value) > LONGEST_VALUE:
            raise ValueError("a value in the store is too long")
        if not at:
            root, length = node, 0
        else:
            if number(parent, "parent", 32) >= at:
                raise ValueError("a node of the store is below one that is not there")
            above, length = made[parent]
            length += 1 + len(name)
            if name in above or not name or "/" in name or not _CHARACTERS.issuperset(name) or length > LONGEST_PATH:
                raise ValueError("a node of the store has no name that it can have")
            above[name] = node
        made.append((children, length))
    return root


def _right(word: Any) -> tuple[int, str]:
    if not isinstance(word, str) or not _RIGHT.fullmatch(word):
        raise ValueError("a node of the store has rights that are none")
    return number(int(word[1:]), "a domain", 15), word[0]


def split(path: str) -> list[str]:
    """The names along an absolute path; StoreError for one that is none."""
    if not path.startswith("/") or len(path) > LONGEST_PATH or not _CHARACTERS.issuperset(path):
        raise StoreError("EINVAL")
    if path == "/":
        return []
    names = path[1:].split("/")
    if not all(names):
        raise StoreError("EINVAL")
    return names


def find(root: Node, path: str) -> Node | None:
    """The node at an absolute path."""
    node: Node | None = root
    for name in split(path):
        assert node is not None
        node = node.children.get(name)
        if node is None:
            return None
    return node


def put(root: Node, names: list[str], node: Node, domain: int) -> Node:
    """A root with `node` at `names`; nodes missing on the way are made, the domain's, with their parent's rights.

    Paths can be deeper than Python lets functions call themselves.
    """
    parents = [root]
    for name in names[:-1]:
        parent = parents[-1]
        parents.append(parent.children.get(name) or Node(permissions=inherited(parent, domain)))
    return _rebuilt(parents, names, node)


def _rebuilt(parents: list[Node], names: list[str], node: Node) -> Node:
    """The root when the last of `parents` has `node` under the last of `names`, and so on up."""
    for parent, name in zip(reversed(parents), reversed(names), strict=False):
        node = parent.with_children({**parent.children, name: node})
    return node


def inherited(parent: Node, domain: int) -> Permissions:
    """The rights of a new node: its parent's, but owned by the unprivileged domain that makes it."""
    if domain == 0:
        return parent.permissions
    return ((domain, parent.permissions[0][1]), *parent.permissions[1:])


def remove(root: Node, names: list[str]) -> Node:
    """A root without the node at `names`, which is there and is not the root."""
    parents = [root]
    for name in names[:-1]:
        parents.append(parents[-1].children[name])
    children = dict(parents[-1].children)
    del children[names[-1]]
    return _rebuilt(parents[:-1], names[:-1], parents[-1].with_children(children))
