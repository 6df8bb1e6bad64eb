"""The monitor: `VirtualMachine` builds a machine, boots its guest and runs it until it stops."""

from __future__ import annotations

from trivisor.monitor.outcome import Outcome, StopReason
from trivisor.monitor.techniques import TechniqueUnavailable
from trivisor.monitor.virtual_machine import VirtualMachine

__all__ = ["Outcome", "StopReason", "TechniqueUnavailable", "VirtualMachine"]
