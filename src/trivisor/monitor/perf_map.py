"""The file by which Linux's perf names code that was made at run time (tools/perf/Documentation/jit-interface.txt).

A line for each piece of code: host address and bytes, in hexadecimal, and a
name.  perf looks for it when it reports, by the process's number.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from pathlib import Path
from typing import Any, TextIO

from trivisor.machine.vcpu import Vcpu
from trivisor.translation.block_tables import STEP, Block
from trivisor.translation.cpu import TranslationVcpu

_USER = 4
"""Of a block's mode key: code of CPL 3."""


def default_path() -> Path:
    """Where perf looks for the map of this process."""
    return Path(f"/tmp/perf-{os.getpid()}.map")


def open_perf_map(path: Path, kernel: Path) -> PerfMap:
    """An empty map at `path`, for the guest `kernel`."""
    return PerfMap(path, Symbols(kernel))


class Symbols:
    """The functions of a guest kernel by linear address; none for files that do not tell."""

    def __init__(self, kernel: Path) -> None:
        from elftools.common.exceptions import ELFError  # slow to import
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection

        found: list[tuple[int, str]] = []
        try:
            with kernel.open("rb") as file:
                for section in ELFFile(file).iter_sections():
                    if isinstance(section, SymbolTableSection):
                        found += [(s["st_value"], s.name) for s in section.iter_symbols() if _names_code(s)]
        except (ELFError, OSError, ValueError, KeyError, UnicodeDecodeError):
            found = []  # compressed, stripped or damaged: addresses have to do
        found.sort()
        self._addresses = [address for address, _ in found]
        self._names = [name for _, name in found]

    def name(self, address: int) -> str:
        """The function at or before `address` with the distance from it, or the address."""
        index = bisect_right(self._addresses, address) - 1
        if index < 0 or address - self._addresses[index] >= 1 << 20:
            return f"{address:#x}"
        distance = address - self._addresses[index]
        return self._names[index] + (f"+{distance:#x}" if distance else "")


def _names_code(symbol: Any) -> bool:
    return bool(symbol.name) and symbol["st_info"]["type"] in ("STT_FUNC", "STT_NOTYPE") and symbol["st_value"] > 0


class PerfMap:
    """Writes the map of one or more processors in turn; raises OSError for a file that cannot be written."""

    def __init__(self, path: Path, symbols: Symbols) -> None:
        self._symbols = symbols
        # Others may write to the directory too: no link of theirs is followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        self._file: TextIO = os.fdopen(os.open(path, flags, 0o644), "w")

    def watch(self, vcpu: Vcpu) -> None:
        """Have what the processor forgets written before that."""
        if not isinstance(vcpu, TranslationVcpu):
            raise ValueError("a perf map names translated code, and this technique has none")
        for address, size, label in vcpu.helpers():
            self._line(address, size, f"trivisor:{label}")
        vcpu.blocks.on_flush = lambda: self.write(vcpu)

    def write(self, vcpu: Vcpu) -> None:
        """Add all the code that the processor has now."""
        assert isinstance(vcpu, TranslationVcpu), "as watched"
        for address, size, block in vcpu.blocks.code():
            self._line(address, size, self._name(block))
        self._file.flush()

    def _name(self, block: Block) -> str:
        level = "user" if block.key & _USER else "kernel"
        return f"guest-{level}:{self._symbols.name(block.rip)}{':step' if block.flags & STEP else ''}"

    def _line(self, address: int, size: int, name: str) -> None:
        self._file.write(f"{address:x} {size:x} {name}\n")

    def close(self) -> None:
        """No more is written."""
        self._file.close()
