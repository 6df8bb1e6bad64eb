"""Comparing the translated execution of unprivileged instructions with the host processor's own.

Random sequences of instructions run twice from the same state and over the
same memory: natively, as the bytes they are, and on a `TranslationVcpu`.  They
must end in the same registers, flags and memory, and in the same fault.

    python -m trivisor.insight.differential --seed 1 --count 10000
"""

from trivisor.insight.differential.hunt import Difference, Hunt, Report, run
from trivisor.insight.differential.native import is_available

__all__ = ["Difference", "Hunt", "Report", "is_available", "run"]
