"""Putting a PV domain together: memory, frame table, Xen's own part, the domain, and the builder's work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trivisor.boot.xen_notes import XenKernel
from trivisor.devices.disk_file import DiskFile
from trivisor.machine.clock import Clock
from trivisor.machine.deprivileged import DeprivilegedCpu
from trivisor.machine.memory import MAXIMUM_RAM, PAGE_SIZE, GuestMemory
from trivisor.machine.saved_values import numbers, part
from trivisor.machine.saving import Remembers, Saved
from trivisor.machine.state import CpuState, Segment, Table
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.back_ends.back_end import BackEnd, Guest
from trivisor.paravirt.xen.back_ends.block import BlockBackEnd
from trivisor.paravirt.xen.back_ends.network import NetworkBackEnd, Plug
from trivisor.paravirt.xen.builder import DomainBuilder
from trivisor.paravirt.xen.console import ConsoleRing
from trivisor.paravirt.xen.debug_registers import set_debug_register
from trivisor.paravirt.xen.domain import OWN_ID, Domain
from trivisor.paravirt.xen.events import EventChannels
from trivisor.paravirt.xen.frames import Frames, split
from trivisor.paravirt.xen.grants import BACK_END_DOMAIN, GrantTable
from trivisor.paravirt.xen.own_memory import GDT_ADDRESS, OwnMemory, own_size
from trivisor.paravirt.xen.page_tables import PageTables
from trivisor.paravirt.xen.platform import Platform
from trivisor.paravirt.xen.saved_memory import check_memory, load_memory, save_memory
from trivisor.paravirt.xen.saved_processor import goes_on
from trivisor.paravirt.xen.shared_table import SharedTable
from trivisor.paravirt.xen.time import SystemTime
from trivisor.paravirt.xen.toolstack import DISK_NAMES, NETWORK_NAME, add_disk, add_network, introduce
from trivisor.paravirt.xen.xenstore.ring import StoreRing
from trivisor.paravirt.xen.xenstore.store import Store
from trivisor.x86.control import (
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
)
from trivisor.x86.flags import FIXED, IF

_RSP, _RSI = 4, 6
_LIMIT = 0xFFFFFFFF
_CR0 = CR0_PG | CR0_WP | CR0_NE | CR0_ET | CR0_MP | CR0_PE


class XenMachine(Remembers):
    """The memory and platform of one PV domain, before it has a processor; then, with one, the domain.

    `size` is the domain's memory in bytes; the machine has Xen's own part beside it.
    """

    def __init__(
        self,
        size: int,
        clock: Clock,
        *,
        console_output: Callable[[bytes], None],
        tsc: Callable[[], int],
        tsc_frequency: int,
        on_stop: Callable[[], None],
    ) -> None:
        self.memory = GuestMemory(min(size + own_size(size), MAXIMUM_RAM))
        self.size = size
        self._output = console_output
        table = SharedTable()
        frames = self._frames = Frames(self.memory, table)
        own = self._own = OwnMemory(self.memory, frames)
        self.ram = [
            range(max(start // PAGE_SIZE, own.end), (start + length) // PAGE_SIZE)
            for start, length in self.memory.regions()
        ]
        """What is not Xen's own."""
        pages = min(size // PAGE_SIZE, sum(map(len, self.ram)))
        self.events = EventChannels(self.memory, own.shared_info * PAGE_SIZE)
        self._private = own.private()
        self.platform = Platform(
            self.memory, clock, self.events, tsc=tsc, tsc_frequency=tsc_frequency, on_stop=on_stop
        )
        time = SystemTime(self.memory, clock, tsc_frequency, lambda: self.platform.tsc(), table)
        tables = self._tables = PageTables(
            frames, own.slots, lambda: self.domain.flush(),
            lambda frame: self.domain.cpu.memory_written(frame * PAGE_SIZE, PAGE_SIZE),
            lambda *changed: self.domain.cpu.entry_changed(*changed),
        )  # fmt: skip
        grants = GrantTable(frames, own.grant_frames, own.status_frames)
        self.domain = Domain(self.platform, frames, own, tables, self.events, grants, time, console_output)
        self.domain.pages = pages
        self.store = Store()
        introduce(self.store, OWN_ID, pages)
        self._guest = Guest(
            self.store, self.events, grants, self.memory, clock,
            lambda address, length: self.domain.cpu.memory_written(address, length),
        )  # fmt: skip
        self._back_ends: dict[str, BackEnd] = {}

    def attach_disk(self, disk: DiskFile) -> None:
        """Give the domain its next disk, of `DISK_NAMES` at most; it is closed with the machine."""
        number = sum(isinstance(device, BlockBackEnd) for device in self._back_ends.values())
        front, back = add_disk(self.store, OWN_ID, number, readonly=disk.readonly)
        name = DISK_NAMES[number]
        self._back_ends[name] = BlockBackEnd(self._guest, front, back, disk, name)

    def attach_network(self, plug: Plug) -> None:
        """Give the domain its network card, whose link is made by `plug` and closed with the machine."""
        front, back = add_network(self.store, OWN_ID)
        self._back_ends[NETWORK_NAME] = NetworkBackEnd(self._guest, front, back, plug)

    @property
    def changed_disks(self) -> list[tuple[str, Path]]:
        """(name, file) of disks that were written to since the snapshot from which this machine goes on."""
        disks = (device for device in self._back_ends.values() if isinstance(device, BlockBackEnd))
        return [(disk.name, disk.disk.path) for disk in disks if disk.is_changed]

    def statistics(self) -> dict[str, Any]:
        """What crossed into the hypervisor, and what the back ends did."""
        devices = {name: device.statistics() for name, device in self._back_ends.items()}
        return {**self.domain.statistics(), **devices}

    def close_devices(self) -> None:
        """Finish what the back ends have under way and end them; harmless the second time."""
        for device in self._back_ends.values():
            device.close()
        self._back_ends.clear()

    def close(self) -> None:
        """Give everything back to the host."""
        self.close_devices()
        self._frames.words.release()
        self.memory.close()

    def give_slot(self, entry: int) -> None:
        """Have `own_memory.ENGINE_SLOT` of every level-4 table be `entry`; before the domain is built."""
        self._own.give_slot(entry)

    def start(self, cpu: DeprivilegedCpu, kernel: XenKernel, initrd: bytes | None, command_line: str) -> CpuState:
        """Build the domain; returns the state with which its processor begins.  Raises ImageError."""
        domain, events, own = self.domain, self.events, self._own
        domain.cpu = cpu
        frames_of, rest = split(self.ram, domain.pages)
        self._frames.hand_over(frames_of)
        self._frames.give_free(rest)
        store_port = events.allocate_unbound(BACK_END_DOMAIN)
        console_port = events.allocate_unbound(BACK_END_DOMAIN)
        builder = DomainBuilder(kernel, self._frames, own, self._tables, frames_of)
        started = builder.build(initrd, command_line, store_port, console_port)
        for frame in (started.store_frame, started.console_frame):
            self._frames.hold(frame, writable=True)
        self._rings = (started.console_frame, console_port, started.store_frame, store_port)
        console, ring = self._make_rings()
        events.bind_back_end(console_port, console.guest_sent)
        events.bind_back_end(store_port, ring.guest_sent)
        shared = own.shared_info * PAGE_SIZE
        self.memory.write(shared + 1, b"\1")  # events are masked at first
        domain.time.write(shared + abi.VCPU_INFO_TIME)
        domain.time.write_wallclock(shared + abi.SHARED_WALLCLOCK)
        domain.state.kernel_root = started.root
        domain.state.cr0, domain.state.cr4 = _CR0, CR4_PAE
        return _first_state(started.entry, started.stack, started.start_info, started.root)


    def _make_rings(self) -> tuple[ConsoleRing, StoreRing]:
        """The back ends of console and store, at `_rings`."""
        console_frame, console_port, store_frame, store_port = self._rings
        pending = self.events.set_pending
        console = self.platform.console = ConsoleRing(
            self.memory, console_frame * PAGE_SIZE, self._output, partial(pending, console_port)
        )
        self._store_ring = StoreRing(
            self.memory, store_frame * PAGE_SIZE, self.store, OWN_ID, partial(pending, store_port)
        )
        return console, self._store_ring

    # -- into a snapshot and out of it ----------------------------------------------------------------------

    def clear(self) -> None:
        """The whole memory is zeros, to be given another's content."""
        self.memory.write(0, bytes(self._own.end * PAGE_SIZE))

    def quiesce(self) -> None:
        """Finish what back ends have under way, and tell the guest; before any part of it is saved."""
        for device in self._back_ends.values():
            device.quiesce()

    def save(self) -> Saved:
        """All but the memory's content and the processor, after `quiesce`; raises OSError for a disk that fails."""
        domain = self.domain
        return {
            "memory": save_memory(domain),
            "rings": [*self._rings],
            "state": domain.state.save(),
            "events": self.events.save(),
            "grants": domain.grants.save(),
            "grant_maps": domain.grant_maps.save(),
            "time": domain.time.save(),
            "timers": domain.timers.save(),
            "store": self.store.save(),
            "store_ring": self._store_ring.save(),
            "back_ends": {name: device.save() for name, device in self._back_ends.items()},
        }

    def load(self, saved: Saved) -> None:
        """Instead of `start`, once the memory has its content and `domain.cpu` is set; then comes `go_on`.

        ValueError for what no domain can be.
        """
        domain, events = self.domain, self.events
        for address, content in self._private:
            self.memory.write(address, content)
        domain.state.load(part(saved, "state"))
        domain.state.cr0 = _CR0
        events.load(part(saved, "events"))
        rings = numbers(saved, "rings", [40, 12, 40, 12])
        self._rings = (rings[0], rings[1], rings[2], rings[3])
        domain.grants.load(part(saved, "grants"))  # first: the guest may have mapped its status frames
        load_memory(domain, self.ram, part(saved, "memory"), [rings[0], rings[2]])
        domain.grant_maps.load(part(saved, "grant_maps"))
        self._load_back_ends(part(saved, "back_ends"))
        check_memory(domain, part(saved, "memory"))
        domain.vcpu_info_moved()
        self.store.load(part(saved, "store"))
        console, ring = self._make_rings()
        ring.load(part(saved, "store_ring"))
        events.rebind_back_end(self._rings[1], console.guest_sent)
        events.rebind_back_end(self._rings[3], ring.guest_sent)

    def _load_back_ends(self, saved: Saved) -> None:
        if not {*saved} <= {*DISK_NAMES, NETWORK_NAME}:
            raise ValueError("there are no such devices")
        if {*saved} != {*self._back_ends}:
            had, has = (", ".join(sorted(names)) or "no device" for names in (saved, self._back_ends))
            raise ValueError(f"its guest had {had} and is given {has}; --disk and --net have to be as they were")
        for name, device in self._back_ends.items():
            device.load(part(saved, name))

    def processor(self, saved: CpuState) -> CpuState:
        """The state with which the processor goes on after `load`; ValueError for one that it cannot be in."""
        state = self.domain.state
        root = state.kernel_root if state.in_kernel else state.user_root
        return goes_on(saved, _first_state(0, 0, 0, root), self.domain.cpu.xcr0_supported)

    def go_on(self, saved: Saved, debug: list[int], tsc_jump: int = 0) -> None:
        """The processor has its state and its time: what hangs on them; `debug` are DR0 to DR7.

        `tsc_jump` is how far the TSC is ahead of where it would be if it had stood still in the snapshot.
        """
        domain, info = self.domain, self.events.vcpu_info
        state = domain.state
        domain.cpu.enter_space((state.kernel_root if state.in_kernel else state.user_root) << 12, state.in_kernel)
        domain.descriptor_tables_changed()
        domain.io_privilege_changed()
        for number in (0, 1, 2, 3, 6, 7):
            if set_debug_register(domain, number, debug[number]):
                raise ValueError(f"DR{number} cannot be so")
        domain.time.load(part(saved, "time"))
        domain.time.moved(tsc_jump)
        domain.time.write(info + abi.VCPU_INFO_TIME)
        domain.time.write_wallclock((self._own.shared_info << 12) + abi.SHARED_WALLCLOCK)
        domain.tell_time()
        domain.timers.load(part(saved, "timers"))


def _first_state(entry: int, stack: int, start_info: int, root: int) -> CpuState:
    def empty() -> Segment:
        return Segment(0, 0, 0, 0)

    state = CpuState(
        rip=entry,
        rflags=FIXED | IF,
        cs=Segment(abi.FLAT_RING3_CS64, 0, _LIMIT, 0xA0FB),
        ss=Segment(abi.FLAT_RING3_SS, 0, _LIMIT, 0xC0F3),
        ds=empty(),
        es=empty(),
        fs=empty(),
        gs=empty(),
        ldtr=Segment(0, 0, 0, 0x10000),
        tr=Segment(0, 0, 0, 0x8B),
        gdtr=Table(GDT_ADDRESS, 0xFFFF),
        idtr=Table(0, 0),
        cr0=_CR0,
        cr3=root * PAGE_SIZE,
        cr4=CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE,
        efer=EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE,
    )
    state.gpr[_RSP] = stack
    state.gpr[_RSI] = start_info
    return state
