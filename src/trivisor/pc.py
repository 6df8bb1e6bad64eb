"""The board: a PC with the devices that kernels expect, the same under every technique.

ISA interrupts go to the 8259A pair and to the I/O APIC alike, IRQ 0 to its
pin 2; the pair's output goes to LINT0 and to I/O APIC pin 0.  What firmware
would have left behind is there: interrupt controllers in virtual wire mode,
the BIOS data area, and ACPI and SMBIOS tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial

from trivisor.devices import acpi_pm, acpi_tables, bios_vectors, smbios
from trivisor.devices.acpi_pm import AcpiPm
from trivisor.devices.acpi_tables import BoardLayout
from trivisor.devices.cmos import Cmos
from trivisor.devices.debug_exit import DebugExit as DebugExitPort
from trivisor.devices.fw_cfg import LENGTH as FW_CFG_LENGTH
from trivisor.devices.fw_cfg import PORT as FW_CFG_PORT
from trivisor.devices.fw_cfg import FwCfg
from trivisor.devices.i8042 import I8042, SystemControlPortA
from trivisor.devices.io_apic import IoApic
from trivisor.devices.local_apic import APIC_BASE, LocalApic
from trivisor.devices.pci import HostBridge, PciConfig
from trivisor.devices.pic import DualPic
from trivisor.devices.pit import Pit8254
from trivisor.devices.post import PostCode
from trivisor.devices.serial import Uart16550
from trivisor.devices.test_device import (
    LINES,
    LINES_PORT,
    MEMORY_BASE,
    MEMORY_LENGTH,
    SCRATCH_LENGTH,
    SCRATCH_PORT,
    DeviceMemory,
    LinePorts,
    ScratchPorts,
)
from trivisor.machine.bus import Bus, Device
from trivisor.machine.clock import Clock
from trivisor.machine.fast_ports import FastPorts
from trivisor.machine.interrupts import InterruptController, Line
from trivisor.machine.memory import LOW_RAM_LIMIT, GuestMemory
from trivisor.machine.saving import Remembers
from trivisor.machine.stop import DebugExit, PowerOff, Reset, StopReason
from trivisor.machine.vcpu import MsrHandler
from trivisor.x86.msr import IA32_APIC_BASE, IA32_TSC_DEADLINE

IO_APIC_BASE = 0xFEC00000
PM_BASE = 0x600
COM1 = 0x3F8
POST = 0x80
SCI = 9
RESET_PORT, RESET_VALUE = 0xCF9, 0x06

E820_RAM, E820_RESERVED = 1, 2
"""Address range types (ACPI specification 6.4, 15.1)."""

_BIOS_DATA_AREA = 0x400
_EXTENDED_BIOS_DATA = 0x9FC00
_VIDEO_MEMORY = 0xA0000
_FIRMWARE_START, _FIRMWARE_END = 0xE0000, 0x100000
_SMBIOS = 0xF0000
_BIOS_HANDLERS = 0xFE000
_BIOS_MASK = 0xFA
"""Of the first 8259A: the timer and the second one's line are open."""
_APIC_WINDOW, _IO_APIC_WINDOW = 0x1000, 0x1000


def crystal_frequency(tsc_frequency: int) -> int:
    """The Hz of a crystal whose whole multiple in CPUID leaf 0x15 gives the TSC exactly, as Linux computes.

    Linux counts in kHz and in 32 bits, so the crystal is a whole number of kHz
    and the ratio is whole too.  It is as low as real crystals are where a ratio
    of up to 100 divides the TSC's kHz, and at most the TSC's own frequency.
    """
    khz = tsc_frequency // 1000
    ratio = next((ratio for ratio in range(100, 1, -1) if khz % ratio == 0), 1 if khz < 1 << 22 else 2)
    return khz // ratio * 1000


class Pc(Remembers):
    """The board around one processor; implements `machine.vcpu.Surroundings`.

    `tsc()` is the time-stamp counter, at `tsc_frequency` Hz, until a processor tells its own.  `serial_output`
    gets what the guest sends on COM1.  `on_stop()` is called once, when a
    device has set `stop_reason`.  The board writes its firmware's data into `memory`, unless
    not `leaves_data`.
    `test_device` adds the device that kvm-unit-tests drives, and of the CPU
    features `absent` those count that the local APIC has to do with.  `wall_time` is the date, in seconds since 1970.
    `crystal` is the frequency of the local APIC timer's input in Hz; 0 has the board choose.
    """

    remembered = ("clock", "pic", "io_apic", "local_apic", "devices")

    def __init__(
        self,
        memory: GuestMemory,
        clock: Clock,
        *,
        serial_output: Callable[[bytes], None],
        tsc: Callable[[], int],
        tsc_frequency: int,
        on_stop: Callable[[], None],
        test_device: bool = False,
        absent: Collection[str] = (),
        wall_time: Callable[[], float] = time.time,
        leaves_data: bool = True,
        crystal: int = 0,
    ) -> None:
        self.memory = memory
        self.clock = clock
        self.ports = Bus("port")
        self.fast_ports = FastPorts()
        self.ports.on_attach = self.fast_ports.claim
        self.mmio = Bus("memory")
        self.apic_id = 0
        self.tsc_frequency = tsc_frequency
        self.crystal_frequency = crystal or crystal_frequency(tsc_frequency)
        self.tsc = tsc
        self.stop_reason: object | None = None  # a StopReason
        self._on_stop = on_stop

        self.local_apic = LocalApic(
            clock, self.apic_id, lambda: self.tsc(), tsc_frequency, self.crystal_frequency,
            has_x2apic="x2apic" not in absent,
        )  # fmt: skip
        self.interrupts: InterruptController = self.local_apic
        self.virtual_apic = self.local_apic.virtual
        self.io_apic = IoApic(self.local_apic.message)
        self._io_apic_pin_0 = self.io_apic.line(0)
        self.pic = DualPic(self._pic_output)
        self.local_apic.pic = self.pic
        self.local_apic.on_end_of_interrupt = self.io_apic.end_of_interrupt
        self.local_apic.on_moved = self._move_local_apic
        self.local_apic.enter_virtual_wire_mode()
        self.msrs = _apic_msrs(self.local_apic, absent)

        reset = partial(self._stop, Reset())
        self.serial = Uart16550(clock, self.isa_line(4), serial_output)
        self.pit = Pit8254(clock, self.isa_line(0))
        high_memory = max(memory.size - memory.low_end, 0)
        self.cmos = Cmos(clock, self.isa_line(8), memory.low_end, high_memory, wall_time)
        self.keyboard = I8042(self.isa_line(1), reset)
        self.pm = AcpiPm(clock, self.isa_line(SCI), partial(self._stop, PowerOff()))
        self.post = PostCode()
        self.pci = PciConfig(reset)
        self.pci.add(0, 0, 0, HostBridge())
        self._attach_devices(reset)
        if test_device:
            self._attach_test_device()
        self.rsdp_address = self._leave_firmware_data() if leaves_data else _FIRMWARE_START

    @property
    def post_code(self) -> int:
        """The last byte that the guest wrote to port 0x80."""
        return self.post.code

    @property
    def console_room(self) -> int:
        """How many bytes `console_input` would take now."""
        return self.serial.room

    def console_input(self, data: bytes) -> int:
        """Send `data` to the guest on COM1; returns how many bytes of it there was room for."""
        return self.serial.feed(data)

    def tsc_changed(self) -> None:
        """The guest has set its time-stamp counter."""
        self.local_apic.tsc_changed()

    def isa_line(self, irq: int) -> Line:
        """The wire of ISA interrupt `irq`, 0 to 15 without 2."""
        to_pic = self.pic.line(irq)
        to_io_apic = self.io_apic.line(irq or 2)

        def drive(level: bool) -> None:
            to_pic(level)
            to_io_apic(level)

        return drive

    def e820(self) -> list[tuple[int, int, int]]:
        """The memory map, lowest first, as (start, length, type)."""
        low, high = self.memory.low_end, self.memory.high_end
        ranges = [
            (0, _EXTENDED_BIOS_DATA, E820_RAM),
            (_EXTENDED_BIOS_DATA, _VIDEO_MEMORY, E820_RESERVED),
            (_FIRMWARE_START, _FIRMWARE_END, E820_RESERVED),
            (_FIRMWARE_END, low, E820_RAM),
        ]
        if high:
            ranges.append((1 << 32, high, E820_RAM))
        return [(start, end - start, kind) for start, end, kind in ranges]

    @property
    def devices(self) -> tuple[Remembers, ...]:
        """The devices on the port bus but the interrupt controllers, and those that the buses only show in part."""
        return (self.serial, self.pit, self.cmos, self.keyboard, self.pm, self.post, self.pci, *self._small)

    @devices.setter
    def devices(self, devices: tuple[Remembers, ...]) -> None:
        assert devices == self.devices  # loading changes them in place

    def _attach_devices(self, reset: Callable[[], None]) -> None:
        port_92, fw_cfg = SystemControlPortA(reset), FwCfg(self.memory.size, cpus=1)
        self._small: list[Remembers] = [port_92, fw_cfg]
        windows: list[tuple[int, int, Device]] = [
            (0x20, 2, self.pic.master),
            (0x40, 4, self.pit),
            (0x60, 1, self.keyboard.data),
            (0x61, 1, self.pit.speaker),
            (0x64, 1, self.keyboard.command),
            (0x70, 2, self.cmos),
            (POST, 1, self.post),
            (0x92, 1, port_92),
            (0xA0, 2, self.pic.slave),
            (0xF4, 4, DebugExitPort(lambda status: self._stop(DebugExit(status & 0xFF)))),
            (COM1, 8, self.serial),
            (0x4D0, 2, self.pic.elcr),
            (FW_CFG_PORT, FW_CFG_LENGTH, fw_cfg),
            (PM_BASE, acpi_pm.WINDOW_LENGTH, self.pm),
            (0xCF8, 8, self.pci),
        ]
        for base, length, device in windows:
            self.ports.attach(base, length, device)
        self.post.reveal(self.fast_ports.register(POST))
        self.serial.reveal(self.fast_ports, COM1)
        self.mmio.attach(IO_APIC_BASE, _IO_APIC_WINDOW, self.io_apic)
        self._local_apic_base: int | None = APIC_BASE
        self.mmio.attach(APIC_BASE, _APIC_WINDOW, self.local_apic)

    def _move_local_apic(self, base: int) -> bool:
        """The window goes to `base`; where another device or RAM answers, it is hidden behind that."""
        if self._local_apic_base is not None:
            self.mmio.detach(self._local_apic_base)
            self._local_apic_base = None
        with suppress(ValueError):
            self.mmio.attach(base, _APIC_WINDOW, self.local_apic)
            self._local_apic_base = base
        return self._local_apic_base is not None

    def _attach_test_device(self) -> None:
        """The lines are those of the I/O APIC's pins, where the ISA interrupts reach the 8259 pair as well."""
        lines = [self.isa_line(n) if n < 16 and n != 2 else self.io_apic.line(n) for n in range(LINES)]
        scratch, memory = ScratchPorts(), DeviceMemory()
        self._small += [scratch, memory]
        self.ports.attach(SCRATCH_PORT, SCRATCH_LENGTH, scratch)
        self.mmio.attach(MEMORY_BASE, MEMORY_LENGTH, memory)
        self.ports.attach(LINES_PORT, LINES, LinePorts(lines))

    def _pic_output(self, level: bool) -> None:
        self.local_apic.lint0(level)
        self._io_apic_pin_0(level)

    def _stop(self, reason: StopReason) -> None:
        if self.stop_reason is None:  # what the guest does after its end no longer counts
            self.stop_reason = reason
            self._on_stop()

    def leave_bios_interrupts(self) -> None:
        """For guests that go back to real mode: vectors in the table, the timer at 18.2 Hz and no longer masked."""
        table, handlers = bios_vectors.build(_BIOS_HANDLERS)
        self.memory.write(0, table)
        self.memory.write(_BIOS_HANDLERS, handlers)
        self.pit.write(3, 1, 0x36)
        self.pit.write(0, 1, 0)
        self.pit.write(0, 1, 0)
        self.pic.master.write(1, 1, _BIOS_MASK)

    def _leave_firmware_data(self) -> int:
        """Write the BIOS data area, the ACPI and SMBIOS tables; return the address of the RSDP."""
        memory = self.memory
        memory.write_u16(_BIOS_DATA_AREA, COM1)
        memory.write_u16(_BIOS_DATA_AREA + 0x0E, _EXTENDED_BIOS_DATA >> 4)
        memory.write_u16(_BIOS_DATA_AREA + 0x13, _EXTENDED_BIOS_DATA >> 10)  # KiB of base memory
        memory.write_u8(_EXTENDED_BIOS_DATA, (_VIDEO_MEMORY - _EXTENDED_BIOS_DATA) >> 10)
        layout = BoardLayout(
            apic_ids=(self.apic_id,),
            local_apic=APIC_BASE,
            io_apic=IO_APIC_BASE,
            pm_base=PM_BASE,
            reset_port=RESET_PORT,
            reset_value=RESET_VALUE,
            pci_window=(LOW_RAM_LIMIT, IO_APIC_BASE - 1),
            sci=SCI,
        )
        memory.write(_FIRMWARE_START, acpi_tables.build(_FIRMWARE_START, layout))
        memory.write(_SMBIOS, smbios.build(_SMBIOS))
        return _FIRMWARE_START  # where the RSDP is


def _apic_msrs(apic: LocalApic, absent: Collection[str]) -> dict[int, MsrHandler]:
    """The MSRs that the local APIC answers."""
    handlers: dict[int, MsrHandler] = {IA32_APIC_BASE: (apic.read_base, apic.write_base)}
    if "tsc_deadline" not in absent:
        handlers[IA32_TSC_DEADLINE] = (apic.read_tsc_deadline, apic.write_tsc_deadline)
    for index in range(0x800, 0x840):
        handlers[index] = (partial(apic.read_msr, index), partial(apic.write_msr, index))
    return handlers
