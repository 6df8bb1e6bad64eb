"""The types of iced-x86's numbers, which its modules of constants do not export: for annotations only.

To the type checker they are enumerations; while running they are plain int.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Code as CodeNumber
    from iced_x86._iced_x86_py import Mnemonic as MnemonicNumber
    from iced_x86._iced_x86_py import OpKind as OpKindNumber
    from iced_x86._iced_x86_py import Register as RegisterNumber
else:
    CodeNumber = MnemonicNumber = OpKindNumber = RegisterNumber = int

__all__ = ["CodeNumber", "MnemonicNumber", "OpKindNumber", "RegisterNumber"]
