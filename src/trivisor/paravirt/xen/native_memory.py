"""How native code of the hypervisor reaches the guest's memory."""

from __future__ import annotations

from trivisor.machine.memory import PAGE_SIZE


def guest_bytes(at: str, size: int, *, write: bool = False, otherwise: str = "xen_python") -> str:
    """rdi = the host address of `size` bytes at the linear address that operand `at` holds.

    A jump to `otherwise` if they run into another page, or the guest's kernel may not read them, or `write` them.
    Registers are lost as by `guest_page` (`machine.deprivileged.NativeSupervision`); r13 is the linear address.
    """
    return f"""
    mov r13, {at}
    mov eax, r13d
    and eax, {PAGE_SIZE - 1:#x}
    cmp eax, {PAGE_SIZE}-{size}
    ja {otherwise}
    {"mov r12d, 1" if write else "xor r12d, r12d"}
    call guest_page
    jnz {otherwise}
"""
