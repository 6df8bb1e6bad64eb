"""The domain builder: what a PV guest finds in memory when it starts (xen.h, "Start-of-day memory layout").

From the kernel's end on lie, each on pages of its own: the ramdisk and the list
of frames, start_info, the xenstore and console rings, the initial page tables
and the boot stack.  For kernels that ask for it the list of frames is mapped
elsewhere and the ramdisk nowhere; these come last.
"""

from __future__ import annotations

import os
import struct
from array import array
from typing import NamedTuple

from trivisor.boot.image import ImageError
from trivisor.boot.xen_notes import XenKernel
from trivisor.machine.memory import MIB, PAGE_SIZE
from trivisor.paravirt.xen.abi import MAX_GUEST_CMDLINE, SIF_MOD_START_PFN, START_INFO_MAGIC
from trivisor.paravirt.xen.frames import L4, Frames, numbers
from trivisor.paravirt.xen.own_memory import OwnMemory
from trivisor.paravirt.xen.page_tables import PageTables, entry_frame

_SMALLEST_PADDING = 512 * 1024
_ALIGNMENT = 4 * MIB
_KERNEL_RIGHTS = 0x67  # present, writable, user, accessed, dirty
_WRITE = 2


class Started(NamedTuple):
    """Where the guest begins: linear addresses, and the frames that Xen shares with it."""

    entry: int
    start_info: int
    stack: int
    root: int
    """The frame of the level-4 table."""
    store_frame: int
    console_frame: int


class _Layout:
    """Pages handed out one part after the other, in the domain's own (pseudo-physical) numbers."""

    def __init__(self, first: int, limit: int) -> None:
        self._next = first
        self._limit = limit

    def take(self, pages: int, what: str) -> int:
        first = self._next
        self._next += pages
        if self._next > self._limit:
            raise ImageError(f"{what} does not fit into the domain's {self._limit // 256} MiB; give it more --memory")
        return first

    @property
    def next(self) -> int:
        return self._next


class DomainBuilder:
    """Builds one domain; `frames_of` are the frames of its pages, in their order."""

    def __init__(
        self, kernel: XenKernel, frames: Frames, own: OwnMemory, tables: PageTables, frames_of: list[range]
    ) -> None:
        self._kernel = kernel
        self._frames = frames
        self._own = own
        self._tables = tables
        self._frames_of = frames_of
        self._pages = sum(map(len, frames_of))

    def _run(self, page: int) -> range:
        """The frames from that of a page on that follow each other; IndexError beyond the last page."""
        for run in self._frames_of:
            if page < len(run):
                return run[page:]
            page -= len(run)
        raise IndexError(page)

    def _frame(self, page: int) -> int:
        return self._run(page)[0]

    def build(self, initrd: bytes | None, command_line: str, store_port: int, console_port: int) -> Started:
        """Load everything; raises ImageError for what does not fit or is not right."""
        kernel, pages = self._kernel, self._pages
        end = -(-kernel.end // PAGE_SIZE)
        layout = _Layout(end, pages)
        if end > pages:
            layout.take(0, "the kernel")
        for address, data in kernel.segments:
            self._write(address, data)
        module = (0, 0) if kernel.unmapped_module else self._place_module(layout, initrd)
        list_pages = -(-8 * pages // PAGE_SIZE)
        p2m = layout.take(list_pages, "the list of frames") if kernel.p2m_base is None else 0
        p2m_address = kernel.address(p2m * PAGE_SIZE) if kernel.p2m_base is None else kernel.p2m_base
        start_info = layout.take(1, "the kernel")
        store, console = layout.take(1, "the kernel"), layout.take(1, "the kernel")
        tables_at, table_pages, stack = self._place_tables(layout)
        p2m_tables, p2m_pages = layout.next, list_pages
        if kernel.p2m_base is not None:
            p2m = layout.take(list_pages, "the list of frames")
            p2m_tables = layout.take(_tables_below_root(list_pages), "the list of frames")
            p2m_pages += _tables_below_root(list_pages)
        self._list_frames(p2m)

        root = self._frame(tables_at)
        all_tables = {*range(tables_at, tables_at + table_pages), *range(p2m_tables, layout.next)}
        self._map(root, tables_at + 1, kernel.address(0), range(self._mapped_end), all_tables)
        if kernel.p2m_base is not None:
            self._map(root, p2m_tables, kernel.p2m_base, range(p2m, p2m + list_pages), set())
        if kernel.unmapped_module:
            module = self._place_module(layout, initrd)
        self._write_start_info(
            start_info, command_line,
            store=(self._frame(store), store_port), console=(self._frame(console), console_port),
            tables=(kernel.address(tables_at * PAGE_SIZE), table_pages),
            p2m=(p2m_address, p2m, p2m_pages), module=module,
        )  # fmt: skip
        if kernel.hypercall_page is not None:
            self._write(kernel.hypercall_page - kernel.virtual_base, hypercall_page())
        self._tables.pin(root, L4)
        self._tables.get_kind(root, L4)  # the processor's
        return Started(
            entry=kernel.entry,
            start_info=kernel.address(start_info * PAGE_SIZE),
            stack=kernel.address((stack + 1) * PAGE_SIZE),
            root=root,
            store_frame=self._frame(store),
            console_frame=self._frame(console),
        )

    def _list_frames(self, p2m: int) -> None:
        """Write the list of frames at page `p2m`, and the other way round the machine-to-physical table."""
        known = numbers(max(self._pages, *(run.stop for run in self._frames_of)))
        page = 0
        for run in self._frames_of:
            end = page + len(run)
            self._write(p2m * PAGE_SIZE + 8 * page, known[run.start : run.stop].cast("B"))
            self._own.set_physical_run(run.start, known[page:end])
            page = end

    def _write(self, address: int, data: bytes | memoryview) -> None:
        """Put `data` at an address in the domain's own memory, where its frames lie."""
        view, at = memoryview(data), 0
        while at < len(view):
            page, offset = divmod(address + at, PAGE_SIZE)
            if page >= self._pages:
                raise self._kernel.fail(f"does not fit into {self._pages // 256} MiB of RAM; give it more --memory")
            run = self._run(page)
            length = min(len(run) * PAGE_SIZE - offset, len(view) - at)
            self._frames.memory.write(run[0] * PAGE_SIZE + offset, view[at : at + length])
            at += length

    def _place_tables(self, layout: _Layout) -> tuple[int, int, int]:
        """(first page of the page tables, how many, page of the boot stack): they map themselves and the stack.

        What they map ends 4 MiB aligned with at least 512 KiB to spare.
        """
        at = layout.next
        count = 1
        while True:
            end = self._kernel.address((at + count + 1) * PAGE_SIZE) + _SMALLEST_PADDING
            end = -(-end // _ALIGNMENT) * _ALIGNMENT
            mapped = (end - self._kernel.address(0)) // PAGE_SIZE
            needed = 1 + _tables_below_root(mapped, self._kernel.address(0))
            if needed <= count:
                break
            count = needed
        self._mapped_end = min(mapped, self._pages)
        tables = layout.take(count, "the page tables")
        return tables, count, layout.take(1, "the boot stack")

    def _place_module(self, layout: _Layout, initrd: bytes | None) -> tuple[int, int]:
        """(page, length) of the ramdisk; for a kernel that wants it mapped its linear address and length."""
        if not initrd:
            return 0, 0
        page = layout.take(-(-len(initrd) // PAGE_SIZE), f"the initrd of {-(-len(initrd) // MIB)} MiB")
        self._write(page * PAGE_SIZE, initrd)
        return page if self._kernel.unmapped_module else self._kernel.address(page * PAGE_SIZE), len(initrd)

    def _map(self, root: int, tables_at: int, address: int, pages: range, read_only: set[int]) -> None:
        """Map `pages` from linear `address` on, with tables of levels 1 to 3 from page `tables_at` on."""
        words = self._frames.words
        page = pages.start
        while page < pages.stop:
            linear = address + (page - pages.start) * PAGE_SIZE
            table = root
            for shift in (39, 30, 21):
                at = table * 512 + (linear >> shift & 511)
                if not words[at]:
                    words[at] = self._frame(tables_at) << 12 | _KERNEL_RIGHTS
                    tables_at += 1
                table = entry_frame(words[at])
            index = linear >> 12 & 511
            run = self._run(page)
            part = range(page, min(page + min(512 - index, len(run)), pages.stop))
            at = table * 512 + index
            first = run[0] << 12 | _KERNEL_RIGHTS
            words[at : at + len(part)] = array("Q", range(first, first + len(part) * PAGE_SIZE, PAGE_SIZE))
            for other in read_only.intersection(part):
                words[at + other - page] &= ~_WRITE
            page = part.stop

    def _write_start_info(
        self, page: int, command_line: str, *,
        store: tuple[int, int], console: tuple[int, int], tables: tuple[int, int], p2m: tuple[int, int, int],
        module: tuple[int, int],
    ) -> None:  # fmt: skip
        text = os.fsencode(command_line)
        if len(text) >= MAX_GUEST_CMDLINE:
            raise self._kernel.fail(
                f"takes a command line of {MAX_GUEST_CMDLINE - 1} bytes, not {len(text)}; shorten --append"
            )
        if b"\0" in text:
            raise ImageError("a kernel command line cannot hold a NUL character; change --append")
        flags = SIF_MOD_START_PFN if module[1] and self._kernel.unmapped_module else 0
        info = struct.pack(
            "<32sQQI4xQI4xQI4xQQQQQ", START_INFO_MAGIC, self._pages, self._own.shared_info * PAGE_SIZE,
            flags, *store, *console, *tables, p2m[0], *module,
        ) + struct.pack(f"<{MAX_GUEST_CMDLINE}sQQ", text, p2m[1], p2m[2])  # fmt: skip
        self._write(page * PAGE_SIZE, info)


def _tables_below_root(pages: int, address: int = 0) -> int:
    """How many page tables of levels 1 to 3 map `pages` from `address` on."""
    last = address + pages * PAGE_SIZE - 1
    return sum((last >> shift) - (address >> shift) + 1 for shift in (21, 30, 39))


def hypercall_page() -> bytes:
    """The page through which older guests make hypercalls: 32 bytes of code for each number.

    Arguments are in place as for SYSCALL; rcx and r11, which it destroys, are kept.
    IRET takes its frame on the stack and never returns.
    """
    page = bytearray(b"\xcc" * PAGE_SIZE)
    for number in range(PAGE_SIZE // 32):
        # push rcx; push r11; mov eax, number; syscall; pop r11; pop rcx; ret
        code = b"\x51\x41\x53\xb8" + struct.pack("<I", number) + b"\x0f\x05\x41\x5b\x59\xc3"
        if number == 23:  # push rcx; push r11; push rax; mov eax, 23; syscall
            code = b"\x51\x41\x53\x50\xb8" + struct.pack("<I", number) + b"\x0f\x05"
        page[32 * number : 32 * number + len(code)] = code
    return bytes(page)
