"""Host signals that guest code causes or that must reach it: faults in translated code, and the host's timer.

One native handler serves SIGSEGV, SIGFPE, SIGBUS and SIGILL of the whole
process.  When the fault lies in a registered code cache, it sends the thread
to the engine's way out, with every register as it was; any other fault goes to
whatever handler was there before (Python's faulthandler, say), or dies as it
would have without us.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import struct
import threading

from trivisor.machine.host_timer import HostTimer
from trivisor.translation.assembled import assembled
from trivisor.translation.code_cache import CodeCache

FAULTS = (signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGILL)
TIMER_SIGNAL = signal.SIGRTMIN + 9
SAMPLE_SIGNAL = signal.SIGRTMIN + 10
SAMPLES_AT_ONCE = 8
_MAXIMUM_REGIONS = 64

_SA_SIGINFO = 4
_SA_RESTORER = 0x04000000
_SA_NODEFER = 0x40000000
_SA_RESTART = 0x10000000
_SYS_RT_SIGACTION = 13

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# ucontext_t of x86-64 Linux (asm/sigcontext.h): offsets of the saved rsp, rip and exception vector.
_HANDLER = f"""
MAXIMUM_REGIONS equ {_MAXIMUM_REGIONS}
SAMPLES_AT_ONCE equ {SAMPLES_AT_ONCE}
REGISTER_RSP equ 160
REGISTER_RIP equ 168
REGISTER_TRAPNO equ 200
; handler(edi = signal, rsi = siginfo, rdx = ucontext)
fault:
    mov rax, [rdx+REGISTER_RIP]
    mov rcx, [rel regions]
    mov r8d, MAXIMUM_REGIONS
next:
    cmp rax, [rcx]
    jb other
    cmp rax, [rcx+8]
    jb ours
other:
    add rcx, 32
    dec r8d
    jnz next
    ; not ours: go on to the handler that was there before, or to the default action
    mov rcx, [rel previous]
    movsxd r8, edi
    mov rax, [rcx+r8*8]
    cmp rax, 1
    jbe default_action
    jmp rax
default_action:
    ; restore the default and return: the instruction faults again, now fatally
    push rdi
    mov rsi, [rel no_action]
    xor edx, edx
    mov r10d, 8
    mov eax, 13
    syscall
    pop rdi
    ret
ours:
    mov r9, [rdx+REGISTER_RSP]
    cmp r9, [rcx+16]
    jne other
    mov [r9+HOST_FAULT_IP], rax
    movsxd rdi, edi
    mov [r9+HOST_FAULT_SIGNAL], rdi
    mov rax, [rdx+REGISTER_TRAPNO]
    mov [r9+HOST_FAULT_CODE], rax
    mov rax, [rsi+16]
    mov [r9+HOST_FAULT_ADDRESS], rax
    mov rax, [rcx+24]
    mov [rdx+REGISTER_RIP], rax
    ret
restorer:
    mov eax, 15
    syscall
sample:
    mov rax, [rsi+24]
    mov rcx, [rdx+REGISTER_RIP]
    sub rcx, [rax+CODE_BASE]
    cmp rcx, [rax+HELPERS_SIZE]
    jb sampled_helper
    mov rcx, [rdx+REGISTER_RSP]
    cmp rcx, rax
    jne sampled             ; in Python
    inc qword [rax+SAMPLED_CODE]
    mov r8, [rax+SAMPLE_COUNT]
    cmp r8, SAMPLES_AT_ONCE
    jae timer
    mov rcx, [rdx+REGISTER_RIP]
    mov [rax+r8*8+SAMPLES], rcx
    inc r8
    mov [rax+SAMPLE_COUNT], r8
    cmp r8, SAMPLES_AT_ONCE
    jae timer
sampled:
    ret
sampled_helper:
    inc qword [rax+SAMPLED_HELPERS]
    ret
timer:
    mov rax, [rsi+24]
    mov rcx, [rax+POLL_BAD]
    mov qword [rax+PENDING], 1
    mov [rax+ARMED], rcx
    mov [rax+POLL], rcx
    ret
    align 8
; host addresses of the tables, filled in
regions:
    dq 0
previous:
    dq 0
no_action:
    dq 0
"""


class SigAction(ctypes.Structure):
    """struct kernel_sigaction."""

    _fields_ = (
        ("handler", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("restorer", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
    )


class HostSignals:
    """The process-wide handlers; made once, by `instance()`."""

    _instance: HostSignals | None = None
    _lock = threading.Lock()

    @classmethod
    def instance(cls) -> HostSignals:
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def __init__(self) -> None:
        # The tables the handler reads: regions of (start, end, state pointer, way out), then old handlers.
        self._tables = mmap.mmap(-1, 8192)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._tables))
        self._words = memoryview(self._tables).cast("Q")
        self._previous_at = _MAXIMUM_REGIONS * 4
        self._code = CodeCache(4096)
        handler = assembled(_HANDLER)
        code = bytearray(handler.code)
        places = {"regions": 0, "previous": self._previous_at, "no_action": self._previous_at + 128}
        for label, at in places.items():
            struct.pack_into("<Q", code, handler.labels[label], address + 8 * at)
        self._entries = {label: self._code.base + at for label, at in handler.labels.items()}
        self._code.append(code)
        for number in FAULTS:
            old = self._install(number, "fault", _SA_SIGINFO | _SA_NODEFER)
            self._words[self._previous_at + number] = old.handler
        self._install(TIMER_SIGNAL, "timer", _SA_SIGINFO | _SA_RESTART)
        self._install(SAMPLE_SIGNAL, "sample", _SA_SIGINFO | _SA_RESTART)

    def _install(self, number: int, label: str, flags: int) -> SigAction:
        new = SigAction(self._entries[label], flags | _SA_RESTORER, self._entries["restorer"], 0)
        old = SigAction()
        if _libc.syscall(_SYS_RT_SIGACTION, number, ctypes.byref(new), ctypes.byref(old), 8):
            raise OSError(ctypes.get_errno(), f"cannot handle host signal {number}")
        return old

    def register(self, start: int, end: int, state: int, way_out: int) -> int:
        """Send faults in [start, end) with rsp = `state` to `way_out`; returns a slot for `unregister`."""
        with self._lock:
            for slot in range(_MAXIMUM_REGIONS):
                if self._words[slot * 4 + 1] == 0:
                    self._words[slot * 4 + 2] = state
                    self._words[slot * 4 + 3] = way_out
                    self._words[slot * 4] = start
                    self._words[slot * 4 + 1] = end
                    return slot
        raise OSError(f"at most {_MAXIMUM_REGIONS} virtual processors in one process")

    def unregister(self, slot: int) -> None:
        """Free the slot."""
        self._words[slot * 4 + 1] = 0
        self._words[slot * 4] = 0


def poll_timer(state: int) -> HostTimer:
    """A host timer that asks translated code of one state block to come back to Python."""
    HostSignals.instance()
    return HostTimer(TIMER_SIGNAL, state)


class Sampler:
    """Notes where translated code is found running, every so often, for the calling thread.

    (By the host's clock: its timers for processor time go by its ticks alone.)
    Host addresses go to `SAMPLES`; with `SAMPLES_AT_ONCE` of them Python is asked for.
    """

    def __init__(self, state: int) -> None:
        HostSignals.instance()
        self._timer = HostTimer(SAMPLE_SIGNAL, state)

    def every(self, period: int) -> None:
        """Sample each `period` nanoseconds from now on; 0 stops it."""
        self._timer.every(period)

    def close(self) -> None:
        """Delete the host timer."""
        self._timer.close()
