"""trivisor: a virtual machine monitor in Python, by binary translation, hardware and paravirtualization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivisor.monitor import Outcome, StopReason, VirtualMachine

__version__ = "0.1.0"
__all__ = ["Outcome", "StopReason", "VirtualMachine", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that `trivisor --help` stays quick."""
    if name in ("Outcome", "StopReason", "VirtualMachine"):
        from trivisor import monitor

        return getattr(monitor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
