"""The native helpers in place: in the code cache, known to the state block, callable from Python."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from functools import partial

from trivisor.machine.memory import host_map, host_unmap
from trivisor.translation.code_cache import CodeCache
from trivisor.translation.core import MASK64, Core
from trivisor.translation.host_signals import HostSignals
from trivisor.translation.layout import JUMP_CACHE_ENTRIES, OFFSETS
from trivisor.translation.natives import POINTERS, Helpers, assembled_helpers

_PAGE = 4096


class NativeCode:
    """A code cache that begins with the helpers, for one state block.

    `enter(host address)` runs translated code until it leaves and returns the
    exit's number.  The others are what Python asks of the helpers; addresses
    are linear ones of the guest; those about blocks are in `natives/blocks.py`.
    """

    def __init__(self, core: Core, xsave_mask: int, cache_size: int, helpers: Helpers | None = None) -> None:
        """`xsave_mask`: the XCR0 that guests may have on this host, or 0 without XSAVE; `helpers` are made for it."""
        self.cache = CodeCache(cache_size)
        self.xsave_mask = xsave_mask
        program = helpers or assembled_helpers(xsave_mask)
        self.cache.append(program.code)
        self._labels = program.labels
        self._state = core.address
        self._size = core.words[OFFSETS["HELPERS_SIZE"] // 8] = len(program.code)
        self.unreadable = host_map(_PAGE, 0)
        """Host address of a page that faults: what polls are sent to."""
        self._fill_in(core)
        self.enter: Callable[[int], int] = self._bound("enter", 1)
        self.walk: Callable[[int, int], int] = self._bound("walk_for_python", 2)
        self.flush_everything: Callable[[], int] = self._bound("flush_everything", 0)
        self.flush_local: Callable[[], int] = self._bound("flush_local", 0)
        self.flush_jumps = [self._bound(f"flush_{name}_jumps", 0) for name in ("kernel", "user", "other")]
        self.close_pages: Callable[[], int] = self._bound("close_pages", 0)
        self.invalidate_page: Callable[[int], int] = self._bound("invalidate_page", 1)
        self.entry_changed: Callable[[int, int], int] = self._bound("entry_changed", 2)
        self.find_block: Callable[[int, int], int] = self._bound("find_block", 2)
        self.take_up: Callable[[int, int, int, int, int], int] = self._bound("take_up", 5)
        self.connect_link: Callable[[int, int], int] = self._bound("connect_link", 2)
        self.forget_block: Callable[[int], int] = self._bound("forget_block", 1)
        self.forget_bytes: Callable[[int, int, int], int] = self._bound("forget_bytes", 3)
        self.flush_everything()
        self._slot = HostSignals.instance().register(
            self.cache.base + len(program.code), self.cache.base + cache_size, core.address, self.address("fault_leave")
        )

    def helpers(self) -> Iterator[tuple[int, int, str]]:
        """(host address, bytes, label) of the helpers' pieces, ascending."""
        ends = sorted({*self._labels.values(), self._size})
        for start, end in itertools.pairwise(ends):
            label = next(name for name, at in self._labels.items() if at == start)
            yield self.cache.base + start, end - start, label

    def address(self, label: str) -> int:
        """Host address of a helper."""
        return self.cache.base + self._labels[label]

    def _bound(self, label: str, arguments: int) -> Callable[..., int]:
        """A helper with the C calling convention whose first argument is the state block."""
        kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint64] * (arguments + 1))
        function, state = kind(self.address(label)), self._state
        return partial(function, state)

    def _fill_in(self, core: Core) -> None:
        """Tell the state block where everything is."""
        words = core.words
        for field, label in POINTERS.items():
            words[OFFSETS[field] // 8] = self.address(label)
        for field in ("KNOWN_CS", "KNOWN_SS", "KNOWN_KERNEL_CS"):
            words[OFFSETS[f"{field}_SELECTOR"] // 8] = MASK64
        words[OFFSETS["POLL_BAD"] // 8] = self.unreadable
        at = OFFSETS["CODE_USED"] // 8
        self.cache.share_used(words[at : at + 1])
        words[OFFSETS["CODE_BASE"] // 8] = self.cache.base
        words[OFFSETS["CODE_WRITABLE"] // 8] = self.cache.writable_base
        words[OFFSETS["CODE_SIZE"] // 8] = self.cache.size
        for field in ("POLL_GOOD", "ARMED", "POLL"):
            words[OFFSETS[field] // 8] = core.address
        lookup = self.address("lookup").to_bytes(8, "little")
        for name in ("KERNEL", "USER", "OTHER"):
            at = OFFSETS[f"JUMP_CACHE_{name}"]
            core.bytes[at : at + 8 * JUMP_CACHE_ENTRIES] = lookup * JUMP_CACHE_ENTRIES

    def close(self) -> None:
        """Give the host's memory back; nothing may be called afterwards."""
        HostSignals.instance().unregister(self._slot)
        self.cache.close()
        host_unmap(self.unreadable, _PAGE)
