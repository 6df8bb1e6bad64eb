"""Memory accesses that the TLB cannot serve: device registers, page crossings, writes to translated code.

Such an instruction is run by itself, as translated code in which the access
takes its host address from Python instead of the TLB: that of a bounce buffer
or, for a write to a page with translated code, of the page itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from iced_x86 import Code, InstructionInfoFactory, Mnemonic, OpAccess, Register

from trivisor.machine.exits import Exit
from trivisor.translation import wild_jumps
from trivisor.translation.emulator.contract import UnsupportedFeature
from trivisor.translation.layout import EXITS, OFFSETS
from trivisor.translation.translator import priority
from trivisor.translation.translator.recipe import KIND_CHUNK, KIND_JUDGED
from trivisor.translation.translator.registers import GPR
from trivisor.translation.translator.vector_access import BYTE_MOVES
from trivisor.x86.exceptions import ALIGNMENT_CHECK, GENERAL_PROTECTION, STACK_FAULT, X87_ERROR, GuestException
from trivisor.x86.paging import Access, is_canonical

if TYPE_CHECKING:
    from trivisor.translation.cpu import TranslationVcpu

_EXIT_A, _EXIT_B, _EXIT_C, _RESUME, _HOST_R10, _PENDING = (
    OFFSETS[name] // 8 for name in ("EXIT_A", "EXIT_B", "EXIT_C", "RESUME", "HOST_R10", "PENDING")
)
_MISS_DEVICE = OFFSETS["MISS_DEVICE"] // 8
_NO_DEVICE = (1 << 64) - 1
_REGISTER_STORES = frozenset((Code.MOV_RM32_R32, Code.MOV_MOFFS32_EAX))
_REGISTER_LOADS = frozenset((Code.MOV_R32_RM32, Code.MOV_EAX_MOFFS32))
_IMMEDIATE_STORE = Code.MOV_RM32_IMM32
_STEPPED = EXITS["EXIT_STEPPED"]
_SLOW_ACCESS = EXITS["EXIT_SLOW_ACCESS"]
_PREPARED = OFFSETS["PREPARED_0"] // 8
_STATUS_WORD = OFFSETS["FPU"] + 2
_EXCEPTION_SUMMARY = 0x80
_BOUNCE_SLOT = 8192
_MAXIMUM_PREPARED = 4
_STACK_BASES = {Register.RSP, Register.RBP, Register.ESP, Register.EBP}
_READ_AND_WRITTEN = {OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}

_info = InstructionInfoFactory()


@dataclass(slots=True)
class Prepared:
    """One access of the instruction, made possible for the instruction alone."""

    check: int
    linear: int
    size: int
    write: bool
    user: bool
    pieces: list[tuple[int, int]]
    """(physical address, length): two when it crosses pages."""
    bounce: int = -1
    """Offset in the state block of the buffer, or -1 for a write to a code page."""

    @property
    def crosses(self) -> bool:
        return len(self.pieces) > 1


def handle(cpu: TranslationVcpu) -> Exit | None:
    """EXIT_SLOW_ACCESS: fill the TLB and go on, or do the instruction with what it needs prepared."""
    if cpu.core.words[_EXIT_B] >> 16 == 4 and _register_access(cpu):
        return None
    access = _access(cpu)
    return None if access is None else step(cpu, [access])


def _register_access(cpu: TranslationVcpu) -> bool:
    """Do the plain 32-bit moves that drivers of 64-bit kernels access device registers with; False for the rest."""
    core, mode = cpu.core, cpu.mode
    words = core.words
    linear, page = words[_EXIT_A], words[_MISS_DEVICE]
    if page == _NO_DEVICE or linear & 0xFFF > 0xFFC or mode.aligned or mode.bits != 64:
        return False
    physical = page | linear & 0xFFF
    rip = core.linear_rip
    instruction = cpu.blocks.instruction(mode, rip)
    code = instruction.code
    if code in _REGISTER_STORES:
        cpu.mmu.write_register(physical, core.regs[GPR[instruction.op1_register][0]] & 0xFFFFFFFF)
    elif code in _REGISTER_LOADS:
        core.regs[GPR[instruction.op0_register][0]] = cpu.mmu.read_device(physical, 4)
    elif code == _IMMEDIATE_STORE:
        cpu.mmu.write_register(physical, instruction.immediate32)
    else:
        return False
    core.linear_rip = rip + instruction.len
    cpu.count("mmio access")
    return True


def _access(cpu: TranslationVcpu) -> Prepared | None:
    """What the exit describes; None when the TLB has it now and the access can be tried again.

    Raises GuestException for an access that faults.
    """
    try:
        return _described(cpu)
    except GuestException as fault:
        words = cpu.core.words
        raise first_fault(cpu, fault, words[_EXIT_A] if words[_EXIT_B] & KIND_JUDGED else 0) from None


def first_fault(cpu: TranslationVcpu, fault: GuestException, linear: int = 0) -> GuestException:
    """What the instruction at rip raises first, given the fault of its access at `linear`."""
    instruction = cpu.blocks.instruction(cpu.mode, cpu.core.linear_rip)
    if priority.waits(instruction) and cpu.core.bytes[_STATUS_WORD] & _EXCEPTION_SUMMARY:
        return GuestException(X87_ERROR)
    if linear % priority.alignment(instruction):
        return GuestException(GENERAL_PROTECTION, 0)
    return fault


def _described(cpu: TranslationVcpu) -> Prepared | None:
    words, mmu = cpu.core.words, cpu.mmu
    linear, description, retry = words[_EXIT_A], words[_EXIT_B], words[_EXIT_C]
    write, user = bool(description & 1), bool(description & 2)
    check, size, chunk = description >> 4 & 15, description >> 16, description & KIND_CHUNK
    kind = Access.WRITE if write else Access.READ
    if cpu.mode.aligned and is_canonical(linear ^ 1 << 62) and not is_canonical(linear):
        raise GuestException(ALIGNMENT_CHECK, 0)
    try:
        found = mmu.walk(linear, kind, user)
    except GuestException as fault:
        raise _stack_fault(cpu, check) if fault.vector == GENERAL_PROTECTION else fault from None
    room = 0x1000 - (linear & 0xFFF)
    pieces = [(found.physical, min(size, room))]
    ram = mmu.memory.is_ram(found.physical & ~0xFFF, 0x1000)
    debug = cpu.core.debug
    if debug.pages and debug.touches(linear, size):
        ram = False  # every access is to come here: neither the TLB nor a short cut
    if size > room:
        second = mmu.walk(linear + room & ((1 << 64) - 1), kind, user)
        pieces.append((second.physical, size - room))
    elif ram and write and mmu.code_lines[found.physical >> 12] and not _runs_in(cpu, found.physical):
        if chunk:
            cpu.count("code page overwritten")
            cpu.blocks.forget_page(found.physical & ~0xFFF)
        else:
            cpu.count("code page write")
            cpu.blocks.written(found.physical, size)
            words[_HOST_R10] = mmu.memory.base + found.physical
            cpu.resume_at(words[_RESUME])
            return None
    if ram and size <= room and not (write and mmu.code_lines[found.physical >> 12]):
        cpu.count("tlb fill")
        mmu.fill(linear, user, found)
        cpu.resume_at(retry)
        return None
    return Prepared(check, linear, size, write, user, pieces)


def _stack_fault(cpu: TranslationVcpu, check: int) -> GuestException:
    """The exception for an address that is not canonical: #SS for one relative to SS (Intel SDM 1, 3.3.7.1)."""
    instruction = cpu.blocks.instruction(cpu.mode, cpu.core.linear_rip)
    wide = cpu.mode.bits == 64  # where an override by ES, CS, SS or DS does not count
    by_stack = [
        used.base in _STACK_BASES and used.segment not in (Register.FS, Register.GS)
        if wide
        else used.segment == Register.SS
        for used in _info.info(instruction).used_memory()
    ]
    if all(by_stack) or (any(by_stack) and (check == 0) == (instruction.mnemonic == Mnemonic.POP)):
        return GuestException(STACK_FAULT, 0)
    return GuestException(GENERAL_PROTECTION, 0)


def _runs_in(cpu: TranslationVcpu, physical: int) -> bool:
    """Whether the instruction itself stands in the page."""
    page, _ = cpu.mmu.fetch(cpu.core.linear_rip, cpu.mode.user_view)
    return page == physical & ~0xFFF


def step(cpu: TranslationVcpu, prepared: list[Prepared]) -> Exit | None:
    """Run the one instruction at rip, with these accesses prepared, and with more as it asks for them."""
    ready = 0
    start = cpu.core.linear_rip
    while True:
        if len(prepared) > _MAXIMUM_PREPARED:
            raise UnsupportedFeature("too many slow accesses in one instruction")
        mask = sum(1 << access.check for access in prepared)
        block = cpu.blocks.step_block(cpu.mode, cpu.core.linear_rip, mask)
        for number, access in enumerate(prepared):
            if number >= ready or access.bounce < 0:  # a device is read once only: that has effects
                _prepare(cpu, access, number)
        ready = len(prepared)
        exit_number = cpu.enter_step(block)
        while exit_number == _SLOW_ACCESS and (another := _access(cpu)) is None:
            exit_number = cpu.enter_next()
        if exit_number == _SLOW_ACCESS:
            assert another is not None
            prepared.append(another)
            continue
        if exit_number == _STEPPED:
            wild_jumps.check_step(cpu, start)
            watches = bool(cpu.core.debug.pages)
            for access in prepared:
                _finish(cpu, access)
                if watches:
                    cpu.core.debug.accessed(access.linear, access.size, write=access.write)
            if cpu.core.debug.pending:
                cpu.core.words[_PENDING] = 1
            return None
        return cpu.handle(exit_number)


def _prepare(cpu: TranslationVcpu, access: Prepared, number: int) -> None:
    mmu, core = cpu.mmu, cpu.core
    physical, length = access.pieces[0]
    if not access.crosses and mmu.memory.is_ram(physical & ~0xFFF, 0x1000):
        # A write to a page with translated code - what it hits is forgotten first - or watched memory.
        if access.write and mmu.code_lines[physical >> 12]:
            cpu.count("code page write")
            cpu.blocks.written(physical, length)
        core.words[_PREPARED + access.check] = mmu.memory.base + physical
        return
    cpu.count("page crossing" if access.crosses else "mmio access")
    # The buffer has the access at the same place in a page, for the sake of its alignment.
    access.bounce = OFFSETS["BOUNCE"] + number * _BOUNCE_SLOT + (access.linear & 0xFFF)
    if not access.write or _reads(cpu, access):
        where = access.bounce
        for piece, size in access.pieces:
            data = mmu.read_physical(piece, size)
            core.bytes[where : where + size] = data
            where += size
    core.words[_PREPARED + access.check] = core.address + access.bounce


def _reads(cpu: TranslationVcpu, access: Prepared) -> bool:
    """Whether the instruction also reads what it writes; RAM may always be read."""
    if all(cpu.mmu.memory.is_ram(piece, size) for piece, size in access.pieces):
        return True
    instruction = cpu.blocks.instruction(cpu.mode, cpu.core.linear_rip)
    return instruction.mnemonic in BYTE_MOVES or any(
        memory.access in _READ_AND_WRITTEN for memory in _info.info(instruction).used_memory()
    )


def _finish(cpu: TranslationVcpu, access: Prepared) -> None:
    """Carry out the write that went to the bounce buffer."""
    if access.bounce < 0 or not access.write:
        return
    where = access.bounce
    for piece, size in access.pieces:
        cpu.mmu.write_physical(piece, bytes(cpu.core.bytes[where : where + size]))
        where += size
