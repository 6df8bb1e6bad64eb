"""Runs the compute kernels in this process: `python -m bench.hosted native|unicorn NAME...`.

Native: the machine code is mapped where it wants to be and called as a C function.  Unicorn: the same memory in an
emulator of PyPI's `unicorn` package.  Both print the records as the guest does.  This is a process of its own because
the code is at a fixed address and a fault in it ends the process.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import mmap
import sys
from typing import Any

from bench.guests.kernels import RESULTS, STACK_TOP, Program, program
from bench.guests.long_mode import USER, USER_SIZE

_MAP_FIXED_NOREPLACE = 0x100000


def have_unicorn() -> bool:
    """Whether PyPI's `unicorn` is installed (the extra `bench`)."""
    return importlib.util.find_spec("unicorn") is not None


def run_native(kernels: Program) -> str:
    """Call `main` on this machine's own processor; raises OSError if the address is taken."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE
    if libc.mmap(USER, USER_SIZE, protection, flags, -1, 0) != USER:
        raise OSError(ctypes.get_errno(), f"cannot map the kernels at {USER:#x}")
    memory = memoryview((ctypes.c_ubyte * USER_SIZE).from_address(USER)).cast("B")
    memory[: len(kernels.code)] = kernels.code
    ctypes.CFUNCTYPE(None)(USER + kernels.main)()
    return kernels.records(memory)


def run_unicorn(kernels: Program) -> str:
    """Call `main` in Unicorn."""
    unicorn: Any = importlib.import_module("unicorn")
    registers: Any = importlib.import_module("unicorn.x86_const")
    emulator = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    emulator.mem_map(USER, RESULTS, unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC)
    emulator.mem_map(USER + RESULTS, USER_SIZE - RESULTS, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE)
    emulator.mem_write(USER, kernels.code)
    stack, end = USER + STACK_TOP - 16, USER + kernels.exit
    emulator.mem_write(stack, end.to_bytes(8, "little"))
    emulator.reg_write(registers.UC_X86_REG_RSP, stack)
    emulator.emu_start(USER + kernels.main, end)
    return kernels.records(memoryview(bytes(emulator.mem_read(USER, USER_SIZE))))


if __name__ == "__main__":
    where = {"native": run_native, "unicorn": run_unicorn}[sys.argv[1]]
    print(where(program(sys.argv[2:])), end="")
