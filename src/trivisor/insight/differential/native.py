"""Running a case on the host processor itself, faults included.

The pages lie at fixed addresses below 4 GiB (and one far above), so that the
native code sees the linear addresses that the guest sees.  A signal handler of
machine code notes a fault and sends the thread to the way out.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import signal
import sys
from struct import pack, pack_into, unpack_from

from trivisor.insight.differential.case import (
    CODE_DATA,
    CODE_DATA_SIZE,
    CODE_FAR,
    CODE_NEAR,
    CODE_PAGES,
    DATA,
    DATA_PAGES,
    FPU_SIZE,
    PAGE,
    READ_ONLY,
    Case,
    Endless,
    Layout,
    Result,
    State,
)
from trivisor.insight.differential.segments import FLAT_CODE64, FLAT_DATA, LOCAL
from trivisor.machine.state import GPR_NAMES
from trivisor.translation.host_signals import HostSignals, SigAction
from trivisor.x86.assembler import assemble
from trivisor.x86.cpuid import host_xgetbv

_CONTROL = 0x10000000
_STUB = 0x10010000
_STACK = 0x610000000000
"""Of the signal handlers: where no 32-bit address reaches."""
_STACK_SIZE = 0x40000
_SS_AUTODISARM = 1 << 31
"""Without it the kernel takes a stack pointer that happens to lie in the alternative stack for being on it."""
_FIELDS = {
    "IN_GPR": 0, "IN_FLAGS": 0x80, "IN_FS": 0x88, "IN_GS": 0x90, "IN_RIP": 0x98,
    "OUT_GPR": 0x100, "OUT_FLAGS": 0x180, "SIGNAL": 0x188, "VECTOR": 0x190, "ERROR": 0x198,
    "FAULT_ADDRESS": 0x1A0, "FAULT_RIP": 0x1A8, "TICKS": 0x1B0, "HOST_RSP": 0x1B8, "HOST_FS": 0x1C0, "ACTIVE": 0x1C8,
    "WAY_OUT": 0x1D0, "FAULT_SS": 0x1E8, "IN_FAR": 0xA0,
    "IN_SS": 0xE0, "IN_SEGMENTS": 0xE8, "OUT_SEGMENTS": 0x1D8, "PREVIOUS": 0x200, "IN_FPU": 0x400, "OUT_FPU": 0x800,
}  # fmt: skip

_SA_SIGINFO, _SA_ONSTACK, _SA_RESTORER, _SA_NODEFER, _SA_RESTART = 4, 0x08000000, 0x04000000, 0x40000000, 0x10000000
_TICK = 0.25
"""Seconds of the processor's time."""
_MAP_FIXED_NOREPLACE = 0x100000
_AT_HWCAP2, _HWCAP2_FSGSBASE = 26, 2
_SYS_RT_SIGACTION, _SYS_SIGALTSTACK, _SYS_MODIFY_LDT = 13, 131, 154
_WRITE_LDT = 0x11
_FAULTS = (signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long


def _map(at: int, length: int, protection: int) -> memoryview:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE
    found = _libc.mmap(at, length, protection, flags, -1, 0)
    if found != at:
        raise OSError(ctypes.get_errno(), f"cannot map {length:#x} bytes at {at:#x}")
    return memoryview((ctypes.c_ubyte * length).from_address(at)).cast("B")


def _handle(number: int, handler: int, flags: int, restorer: int) -> int:
    """Install a signal handler of machine code; returns the one before."""
    new, old = SigAction(handler, flags, restorer, 0), SigAction()
    if _libc.syscall(_SYS_RT_SIGACTION, number, ctypes.byref(new), ctypes.byref(old), 8):
        raise OSError(ctypes.get_errno(), f"cannot handle host signal {number}")
    previous: int = old.handler
    return previous


def _program() -> str:
    load = "\n".join(f"mov {name}, [IN_GPR+{8 * i}]" for i, name in enumerate(GPR_NAMES))
    store = "\n".join(f"mov [OUT_GPR+{8 * i}], {name}" for i, name in enumerate(GPR_NAMES) if name != "rsp")
    return f"""
enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [HOST_RSP], rsp
    rdfsbase rax
    mov [HOST_FS], rax
    mov eax, 7
    xor edx, edx
    xrstor [IN_FPU]
    mov rax, [IN_FS]
    wrfsbase rax
    mov rax, [IN_GS]
    wrgsbase rax
    mov qword [ACTIVE], 1
    cmp qword [IN_FAR], 0
    jne enter_narrow
    push qword [IN_FLAGS]
    popfq
    {load}
    jmp qword [IN_RIP]
enter_narrow:
    mov ax, [IN_SEGMENTS]
    mov es, eax
    mov ax, [IN_SEGMENTS+2]
    mov ds, eax
    mov ax, [IN_SEGMENTS+4]
    mov fs, eax
    mov ax, [IN_SEGMENTS+6]
    mov gs, eax
    push qword [IN_FLAGS]
    popfq
    mov rax, [IN_SS]
    mov ss, eax
    {load}
    db 0xff, 0x2c, 0x25 ; jmp far dword [IN_FAR]
    dd IN_FAR
way_out:
    mov [OUT_GPR+32], rsp
    mov rsp, [HOST_RSP]
    pushfq
    pop qword [OUT_FLAGS]
    cld
    {store}
    mov [OUT_SEGMENTS], es
    mov [OUT_SEGMENTS+2], ss
    mov [OUT_SEGMENTS+4], ds
    mov [OUT_SEGMENTS+6], fs
    mov [OUT_SEGMENTS+8], gs
    mov eax, USER_DS
    mov ss, eax
    mov qword [ACTIVE], 0
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov eax, 7
    xor edx, edx
    xsave [OUT_FPU]
    fninit
    vzeroupper
    ldmxcsr [rel default_mxcsr]
    mov rax, [HOST_FS]
    wrfsbase rax
    xor eax, eax
    wrgsbase rax
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    align 4
default_mxcsr: dd 0x1f80

; handler(edi = signal, rsi = siginfo, rdx = ucontext); offsets as in asm/sigcontext.h
tick:
    cmp qword [ACTIVE], 0
    je ticked
    inc qword [TICKS]
    cmp qword [TICKS], 2
    jae end
ticked:
    ret
fault:
    cmp qword [ACTIVE], 0
    je other
end:
    movsxd rax, edi
    mov [SIGNAL], rax
    mov rax, [rdx+168]
    mov [FAULT_RIP], rax
    mov rax, [rdx+192]
    mov [ERROR], rax
    mov rax, [rdx+200]
    mov [VECTOR], rax
    mov rax, [rdx+216]
    mov [FAULT_ADDRESS], rax
    mov eax, [WAY_OUT]
    mov [rdx+168], rax
    mov word [rdx+184], USER_CS
    movzx eax, word [rdx+190]
    mov [FAULT_SS], rax
    mov word [rdx+190], USER_DS
    ret
other:
    movsxd rax, edi
    jmp qword [PREVIOUS+rax*8]
restorer:
    mov eax, 15
    syscall
"""


def is_available() -> bool:
    """Whether the host is one that this can run on: Linux on x86-64 with AVX and FSGSBASE."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    _libc.getauxval.restype = ctypes.c_ulong
    if not _libc.getauxval(_AT_HWCAP2) & _HWCAP2_FSGSBASE:
        return False
    return bool(host_xgetbv() & 4)


class NativeHost:
    """The host processor with the fixed pages; one in a process."""

    _instance: NativeHost | None = None

    @classmethod
    def instance(cls) -> NativeHost:
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def __init__(self) -> None:
        HostSignals.instance()  # its handler has no stack of its own, so ours must be the one in front
        read_write = mmap.PROT_READ | mmap.PROT_WRITE
        everything = read_write | mmap.PROT_EXEC
        self.control = _map(_CONTROL, PAGE, read_write)
        stub = _map(_STUB, PAGE, read_write)
        _map(_STACK, _STACK_SIZE, read_write)
        self.data = _map(DATA, DATA_PAGES * PAGE, read_write)
        self._code = {at: _map(at, CODE_PAGES * PAGE, everything) for at in (CODE_NEAR, CODE_FAR)}
        symbols = {name: _CONTROL + offset for name, offset in _FIELDS.items()}
        symbols |= {"USER_CS": FLAT_CODE64, "USER_DS": FLAT_DATA}
        program = assemble(_program(), origin=_STUB, symbols=symbols)
        stub[: len(program.code)] = program.code
        _libc.mprotect(_STUB, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)
        labels = program.labels
        pack_into("<Q", self.control, _FIELDS["WAY_OUT"], labels["way_out"])
        narrow = b"\xea" + labels["way_out"].to_bytes(4, "little") + FLAT_CODE64.to_bytes(2, "little")
        way_out = (_CONTROL + _FIELDS["WAY_OUT"]).to_bytes(4, "little")
        self._exits = {64: b"\xff\x24\x25" + way_out, 32: narrow, 16: b"\x66" + narrow}
        """Machine code that ends a case: a jump through memory, or a far one into 64-bit code."""
        for one in LOCAL:
            entry = pack("<4I", *one.user_desc)
            if _libc.syscall(_SYS_MODIFY_LDT, _WRITE_LDT, entry, len(entry)):
                raise OSError(ctypes.get_errno(), "modify_ldt: this kernel has no 16-bit segments")
        self._enter = ctypes.CFUNCTYPE(None)(labels["enter"])
        alternate = (ctypes.c_uint64 * 3)(_STACK, _SS_AUTODISARM, _STACK_SIZE)
        self._alternate = ctypes.addressof(alternate)
        self._keep = alternate
        flags = _SA_SIGINFO | _SA_ONSTACK | _SA_RESTORER | _SA_NODEFER
        for number in _FAULTS:
            old = _handle(number, labels["fault"], flags, labels["restorer"])
            pack_into("<Q", self.control, _FIELDS["PREVIOUS"] + 8 * number, old)
        _handle(signal.SIGVTALRM, labels["tick"], flags | _SA_RESTART, labels["restorer"])

    def watch(self, on: bool) -> None:
        """Have code that does not come to an end raise `Endless`, after half a second."""
        signal.setitimer(signal.ITIMER_VIRTUAL, *((_TICK, _TICK) if on else (0, 0)))

    def run(self, case: Case, layout: Layout) -> list[Result]:
        """Run the case natively from each of its states."""
        control, segments = self.control, case.segments
        if segments:
            pack_into("<II", control, _FIELDS["IN_FAR"], case.rip, segments["cs"].selector)
            pack_into("<Q", control, _FIELDS["IN_SS"], segments["ss"].selector)
            pack_into(
                "<4H", control, _FIELDS["IN_SEGMENTS"], *(segments[name].selector for name in ("es", "ds", "fs", "gs"))
            )
        else:
            pack_into("<Q", control, _FIELDS["IN_FAR"], 0)
        _libc.syscall(_SYS_SIGALTSTACK, ctypes.c_void_p(self._alternate), None)
        full = layout.code + self._exits[case.bits]
        return [self._run(case, layout, state, full) for state in case.states]

    def _run(self, case: Case, layout: Layout, state: State, code: bytes) -> Result:
        control = self.control
        _libc.mprotect(READ_ONLY, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        self.data[:] = case.memory(state, layout)
        _libc.mprotect(READ_ONLY, PAGE, mmap.PROT_READ)
        page = self._code[case.code_page]
        page[CODE_DATA : CODE_DATA + CODE_DATA_SIZE] = state.code_data
        at = case.code_offset
        page[at : at + len(code)] = code
        pack_into("<16Q4Q", control, 0, *state.gpr, state.rflags, case.fs_base, case.gs_base, case.rip)
        pack_into("<6Q", control, _FIELDS["SIGNAL"], *[0] * 6)
        control[_FIELDS["IN_FPU"] : _FIELDS["IN_FPU"] + FPU_SIZE] = state.fpu
        self._enter()
        *gpr, flags, number, vector, error, cr2, rip = unpack_from("<22Q", control, _FIELDS["OUT_GPR"])
        if number == signal.SIGVTALRM:
            raise Endless
        return Result(
            gpr,
            rip if number else layout.addresses[-1],
            flags,
            bytes(control[_FIELDS["OUT_FPU"] : _FIELDS["OUT_FPU"] + FPU_SIZE]),
            bytes(self.data),
            bytes(page[CODE_DATA : CODE_DATA + CODE_DATA_SIZE]),
            vector if number else -1,
            error,
            cr2,
            self._selectors(bool(number)) if case.segments else (),
        )

    def _selectors(self, faulted: bool) -> tuple[int, ...]:
        selectors = list(unpack_from("<5H", self.control, _FIELDS["OUT_SEGMENTS"]))
        if faulted:  # the handler's way out had a stack segment of its own
            (selectors[1],) = unpack_from("<H", self.control, _FIELDS["FAULT_SS"])
        return tuple(selectors)
