"""XSAVE's family (Intel SDM 1, chapter 13): what of the area it accesses, what XCR0 forbids, and PKRU as a component.

With PKRU among the components Python does what is otherwise the host's own instruction: both must agree on the rest.
"""

from __future__ import annotations

import random

import pytest

from tests.unit.translation.engine.guest import DATA, Machine, Make, P, U, W
from trivisor.machine.state import CpuState
from trivisor.translation.cpu import TranslationVcpu
from trivisor.x86.control import CR4_OSXSAVE, CR4_PKE, XCR0_AVX, XCR0_PKRU
from trivisor.x86.cpuid import parse_choice

SAVES, RESTORE = ("xsave", "xsavec", "xsaveopt"), "xrstor"
AREA = DATA
HEADER = 512
KEYS = 0x12345678
GP, PF = 13, 14
PAGE = 0x400000


@pytest.fixture
def keyed(machine: Make) -> Make:
    def make(source: str, bits: int = 64, **options: object) -> Machine:
        m = machine(source, bits, processor=lambda board: TranslationVcpu(board, parse_choice("+pku")), **options)
        if not m.vcpu.xcr0_supported & XCR0_AVX:
            pytest.skip("the host has no AVX")
        return m

    return make


def begin(m: Machine, *, xcr0: int, image: bytes = b"", pkru: int = 0, cpl: int = 0) -> None:
    state = m.initial_state(cpl)
    state.cr4 |= CR4_OSXSAVE | CR4_PKE
    state.xcr0, state.xsave, state.pkru = xcr0, image, pkru
    m.vcpu.state = state


def pkru_offset(m: Machine) -> int:
    return int(m.vcpu.cpuid(0xD, 9)[1])


def random_image(rng: random.Random, size: int = 832) -> bytearray:
    """An area in standard format that XRSTOR takes, of components some of which are initial."""
    image = bytearray(rng.randbytes(size))
    image[0:2] = (rng.getrandbits(16) & 0x0F3F | 0x40).to_bytes(2, "little")
    image[2:4] = (rng.getrandbits(16) & 0x7F00).to_bytes(2, "little")
    image[5:24] = bytes(19)
    image[24:28] = (0x1F80 | rng.choice((0, 0x2000, 0x8000))).to_bytes(4, "little")
    image[HEADER : HEADER + 64] = rng.randrange(8).to_bytes(64, "little")
    return image


def effective(state: CpuState, registers: int = 16) -> tuple[bytes, ...]:
    """The components' values; one that is not in use is initial, whatever its bytes."""
    image = state.xsave
    used = image[HEADER]
    x87 = image[:5] + image[32:160] if used & 1 else b"\x7f\x03\0\0\0" + bytes(128)
    x87 = x87[:5] + b"".join(x87[5 + 16 * i : 15 + 16 * i] for i in range(8))
    sse = image[160 : 160 + 16 * registers] if used & 2 else bytes(16 * registers)
    avx = image[576 : 576 + 16 * registers] if used & 4 else bytes(16 * registers)
    return x87, image[24:28], sse, avx


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("save", SAVES)
def test_saving_with_pkru_saves_the_rest_alike(keyed: Make, save: str, bits: int) -> None:
    rng = random.Random(save)
    m = keyed(f"{save} [{AREA}]\n hlt", bits)
    if bits == 32 and not m.vcpu.xcr0_supported:
        pytest.skip("no XSAVE")
    offset = pkru_offset(m)
    for _ in range(30):
        image, before = bytes(random_image(rng)), rng.randbytes(offset + 64)
        mask, pkru = rng.randrange(8), rng.choice((0, KEYS))
        areas = []
        for keys in (0, XCR0_PKRU):
            m.memory.write(AREA, before)
            begin(m, xcr0=7 | XCR0_PKRU, image=image, pkru=pkru)
            m.halt(rax=mask | keys, rdx=0)
            areas.append(bytearray(m.memory.read(AREA, len(before))))
        plain, with_keys = areas
        header = int.from_bytes(with_keys[HEADER : HEADER + 16], "little")
        assert bool(header & XCR0_PKRU) == bool(pkru)
        plain[HEADER + 1] = with_keys[HEADER + 1]
        if save == "xsavec":
            assert header >> 64 == mask | XCR0_PKRU | 1 << 63
            plain[HEADER + 9] = with_keys[HEADER + 9]
            offset = 832 if mask & XCR0_AVX else 576
        if save != "xsavec" or pkru:
            assert int.from_bytes(with_keys[offset : offset + 8], "little") == pkru
            plain[offset : offset + 8] = with_keys[offset : offset + 8]
        if bits == 32:  # which leaves alone what 64-bit mode has more; the host's instruction does not
            for start, end in ((288, 416), (704, 832)):
                assert with_keys[start:end] == before[start:end]
                plain[start:end] = with_keys[start:end]
        different = [at for at, pair in enumerate(zip(plain, with_keys, strict=True)) if pair[0] != pair[1]]
        assert not different, (mask, image[HEADER])
    assert m.vcpu.statistics()["instructions done by Python"][save] == 30


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("compact", [False, True])
def test_restoring_with_pkru_restores_the_rest_alike(keyed: Make, compact: bool, bits: int) -> None:
    rng = random.Random(compact)
    m = keyed(f"xrstor [{AREA}]\n hlt", bits)
    if compact and "xsavec" not in m.vcpu.guest_cpuid.features:
        pytest.skip("the host has no XSAVEC")
    keys_restored = 0
    for _ in range(40):
        image, mask = random_image(rng, 840), rng.randrange(8)
        saved = image[HEADER]
        form = (7 | 1 << 63) if compact else 0
        results = []
        for keys in (0, XCR0_PKRU):
            image[HEADER : HEADER + 8] = (saved | keys).to_bytes(8, "little")
            image[HEADER + 8 : HEADER + 16] = (form | (keys if compact else 0)).to_bytes(8, "little")
            offset = 832 if compact else pkru_offset(m)
            m.memory.write(AREA, bytes(image[:832]))
            m.memory.write(AREA + offset, KEYS.to_bytes(8, "little"))
            begin(m, xcr0=7 | XCR0_PKRU, image=bytes(random_image(random.Random(1))), pkru=4)
            m.halt(rax=mask | keys, rdx=0)
            results.append(effective(m.vcpu.state, 16 if bits == 64 else 8))
            assert m.vcpu.state.pkru == (KEYS if keys else 4)
            keys_restored += bool(keys)
        assert results[0] == results[1], (mask, saved)
    assert keys_restored == 40


def test_pkru_that_was_initial_is_restored_as_such(keyed: Make) -> None:
    m = keyed(f"xrstor [{AREA}]\n mov ebx, [rsi]\n hlt")
    m.map(PAGE, DATA, P | W | U | 1 << 59)
    m.memory.write(AREA, bytes(900))
    begin(m, xcr0=3 | XCR0_PKRU, pkru=4)
    m.halt(rax=XCR0_PKRU, rdx=0, rsi=PAGE)
    assert m.vcpu.state.pkru == 0


def test_a_restored_pkru_takes_rights_away(keyed: Make) -> None:
    m = keyed(f"mov ebx, [rsi]\n xrstor [{AREA}]\n here: mov ebx, [rsi]\n hlt")
    m.map(PAGE, DATA + 0x10000, P | W | U | 1 << 59)
    m.memory.write(AREA, bytes(900))
    m.memory.write_u64(AREA + HEADER, XCR0_PKRU)
    m.memory.write_u64(AREA + pkru_offset(m), 4)
    begin(m, xcr0=3 | XCR0_PKRU)
    frame = m.fault(rax=XCR0_PKRU, rdx=0, rsi=PAGE)
    assert (frame.vector, frame.error, frame.rip) == (PF, 0x21, m.labels["here"])


@pytest.mark.parametrize("xcr0", [3, 7, 3 | XCR0_PKRU, 7 | XCR0_PKRU])
@pytest.mark.parametrize(
    ("saved", "form", "rest"),
    [
        (XCR0_PKRU, 0, 0), (4, 0, 0), (8, 0, 0), (1 << 63, 0, 0), (3, 1, 0), (3, 0, 1), (3, 0, 1 << 64), (3, 1 << 63, 0),
        (3, 1 << 63 | 3, 0), (1, 1 << 63 | 7, 0), (1, 1 << 63 | 7, 1), (1, 1 << 63 | 7, 1 << 64), (4, 1 << 63 | 3, 0),
        (XCR0_PKRU, 1 << 63 | XCR0_PKRU, 0), (XCR0_PKRU, 1 << 63 | 7, 0), (1, 1 << 63 | 8, 0),
    ],
)  # fmt: skip
def test_headers_that_xrstor_does_not_take(keyed: Make, xcr0: int, saved: int, form: int, rest: int) -> None:
    m = keyed(f"xrstor [{AREA}]\n hlt")
    compacts = "xsavec" in m.vcpu.guest_cpuid.features
    begin(m, xcr0=xcr0)
    m.memory.write(AREA, bytes(1024))
    m.memory.write(AREA + HEADER, (saved | form << 64 | rest << 128).to_bytes(64, "little"))
    components = form & ~(1 << 63)
    if form >> 63:
        wrong = not compacts or components & ~xcr0 or saved & ~components or rest
    else:
        wrong = saved & ~xcr0 or form or rest & (1 << 64) - 1
    if wrong:
        frame = m.fault(rax=1, rdx=0)
        assert (frame.vector, frame.error) == (GP, 0)
    else:
        m.halt(rax=1, rdx=0)


@pytest.mark.parametrize("keys", [0, XCR0_PKRU])
@pytest.mark.parametrize("instruction", [*SAVES, RESTORE])
def test_only_what_the_mask_asks_for_need_be_there(keyed: Make, instruction: str, keys: int) -> None:
    """The page after the header's is missing."""
    m = keyed(f"{instruction} [rsi]\n hlt")
    m.map(PAGE, DATA)
    m.map(PAGE + 0x1000, 0, 0)
    m.memory.write(DATA, bytes(0x1000))
    near = pkru_offset(m) == 832
    for size, mask, fine in (
        (576, 3, True), (576, 7, False), (832, 7, True), (640, 7, False),
        (576, 3 | XCR0_PKRU, keys == 0), (896, 3 | XCR0_PKRU, keys == 0 or near), (832, 0, True), (512, 0, False),
    ):  # fmt: skip
        if instruction == "xsavec" and mask & ~3:
            continue  # which parts it stores depends on what is in use
        begin(m, xcr0=7 | keys, pkru=4)
        start = PAGE + 0x1000 - size
        m.memory.write(DATA, bytes(0x1000))
        if size > HEADER:
            m.memory.write_u64(DATA + 0x1000 - size + HEADER, mask & (7 | keys))
        if fine:
            m.halt(rsi=start, rax=mask, rdx=0)
        else:
            frame = m.fault(rsi=start, rax=mask, rdx=0)
            keys_alone = mask == 3 | XCR0_PKRU
            assert (frame.vector, m.core.cr2) == (PF, start + pkru_offset(m) if keys_alone else PAGE + 0x1000)
            assert frame.error == (0 if instruction == RESTORE else 2)


def test_what_is_not_in_the_image_need_not_be_there(keyed: Make) -> None:
    m = keyed("xrstor [rsi]\n hlt")
    m.map(PAGE, DATA)
    m.map(PAGE + 0x1000, 0, 0)
    m.memory.write(DATA, bytes(0x1000))
    m.memory.write_u64(DATA + 0x1000 - 576 + HEADER, 3)
    for keys in (0, XCR0_PKRU):
        begin(m, xcr0=7 | XCR0_PKRU)
        m.halt(rsi=PAGE + 0x1000 - 576, rax=7 | keys, rdx=0)


@pytest.mark.parametrize("instruction", [*SAVES, RESTORE])
def test_the_area_must_be_aligned(keyed: Make, instruction: str) -> None:
    m = keyed(f"{instruction} [rsi]\n hlt")
    for mask in (1, 1 | XCR0_PKRU):
        begin(m, xcr0=7 | XCR0_PKRU)
        assert m.fault(rsi=AREA + 8, rax=mask, rdx=0).vector == GP


def test_mxcsr_with_reserved_bits(keyed: Make) -> None:
    m = keyed(f"xrstor [{AREA}]\n hlt")
    m.memory.write(AREA, bytes(1024))
    m.memory.write_u32(AREA + 24, 1 << 16)
    for mask in (2, 2 | XCR0_PKRU):
        begin(m, xcr0=7 | XCR0_PKRU)
        assert m.fault(rax=mask, rdx=0).vector == GP
        begin(m, xcr0=7 | XCR0_PKRU)
        m.halt(rax=mask & ~2, rdx=0)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("save", SAVES)
def test_an_area_across_pages(machine: Make, save: str, apart: bool) -> None:
    """Of pages that follow each other in memory, which takes no detour, or not; each of them may be missing."""
    m = machine(f"mov rcx, [rsi]\n {RESTORE} [rbx]\n {save} [rdi]\n hlt")
    if not m.vcpu.xcr0_supported & XCR0_AVX:
        pytest.skip("the host has no AVX")
    linear, low, high = 0x10_0000_0000, 0x500000, 0x700000 if apart else 0x501000
    begin(m, xcr0=7)
    rng = random.Random(5)
    for at in (0xE00, 0xFC0, 0xD00):
        m.map(linear, low)
        m.map(linear + 0x1000, high)
        m.map(linear + 0x2000, low + 0x2000)
        m.map(linear + 0x3000, high + 0x2000)
        m.flush()
        image = random_image(rng)
        image[HEADER : HEADER + 64] = (7).to_bytes(64, "little")
        room = 0x1000 - at
        m.memory.write(low + at, bytes(image[:room]))
        m.memory.write(high, bytes(image[room:]))
        m.memory.write(low + 0x2000, bytes(0x1000))
        m.memory.write(high + 0x2000, bytes(0x1000))
        begin(m, xcr0=7)
        m.halt(m.origin, rax=7, rdx=0, rbx=linear + at, rdi=linear + 0x2000 + at, rsi=DATA)
        saved = m.memory.read(low + 0x2000 + at, room) + m.memory.read(high + 0x2000, 832 - room)
        assert saved[:HEADER][160:416] == image[160:416], "XMM0 to XMM15"
        assert saved[576:832] == image[576:832], "their upper halves"
        m.map(linear + 0x3000, 0, 0)
        m.flush()
        begin(m, xcr0=7)
        frame = m.fault(m.origin, rax=7, rdx=0, rbx=linear + at, rdi=linear + 0x2000 + at, rsi=DATA)
        assert (frame.vector, m.core.cr2) == (PF, linear + 0x3000)
    exits = m.vcpu.statistics()["exits"]
    assert ("page crossing" in exits) == apart
