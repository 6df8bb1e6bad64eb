"""How a hypercall fails, is interrupted, or ends its domain."""

from __future__ import annotations


class HypercallError(Exception):
    """The hypercall returns -`number`; `number` is one of the errors in `abi`."""

    def __init__(self, number: int, why: str = "") -> None:
        super().__init__(why or f"error {number}")
        self.number = number


class Preempted(Exception):
    """The hypercall has done enough at a time: it is to be made again with `arguments`, the first ones of it."""

    def __init__(self, *arguments: int) -> None:
        super().__init__("preempted")
        self.arguments = arguments


class DomainCrash(Exception):
    """The guest did what Xen ends a domain for; the text says what."""
