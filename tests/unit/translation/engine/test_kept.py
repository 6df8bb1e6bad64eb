"""Translations kept from one run to the next: what is taken, what is not, and that only the guest's memory counts."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.translation.engine.guest import DATA, Machine, Make
from trivisor.translation import cpu as engine
from trivisor.translation import keeper as keeping
from trivisor.translation import kept
from trivisor.translation.block_tables import TEMPLATE_HEADS, TEMPLATE_SIZE
from trivisor.translation.keeper import Keeper, host_kind

FAR, ALIAS = 0x400000, 0x5000_3000
GUEST = b"this guest"
PROGRAM = (
    f"mov ecx, 20\n xor ebx, ebx\n top: mov edi, {FAR}\n call rdi\n add ebx, eax\n dec ecx\n jnz top\n"
    "mov rax, [DATA]\n mov [DATA+8], rax\n hlt"
)
FUNCTION = "mov eax, 3\n test ecx, 1\n jz even\n add eax, 2\n even: ret"

Kept = Callable[..., tuple[Machine, Keeper]]
"""A machine with a program and FUNCTION at FAR, which takes what is kept; options are the machine's and `guest`."""


def keeper_of(m: Machine, directory: Path, guest: bytes, booted: bytes = b"") -> Keeper:
    cpuid = m.vcpu.guest_cpuid
    keeper = Keeper(directory, host_kind(cpuid.features, cpuid.xcr0_on_host), lambda: guest, booted)
    assert keeper.serve(m.vcpu.blocks) == guest
    return keeper


@pytest.fixture
def keep(machine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    monkeypatch.setattr(keeping, "WORTH_WRITING", 1)
    keepers: list[Keeper] = []

    def make(
        source: str = PROGRAM, function: str = FUNCTION, guest: bytes = GUEST, at: int = FAR, **options: int
    ) -> tuple[Machine, Keeper]:
        m = machine(source, **options)
        m.put(function, at)
        keepers.append(keeper_of(m, tmp_path / "translations", guest))
        return m, keepers[-1]

    yield make
    for keeper in keepers:
        keeper.close()


def translated(m: Machine) -> int:
    return int(m.vcpu.statistics()["translation"]["blocks"])


def the_file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "translations").iterdir()
    return file


def first_run(keep: Kept, tmp_path: Path) -> Path:
    m, keeper = keep()
    m.halt()
    assert m["rbx"] == 10 * 3 + 10 * 5
    assert translated(m) > 3
    keeper.save()
    return the_file(tmp_path)


def test_a_second_run_translates_nothing(keep: Kept, tmp_path: Path) -> None:
    first_run(keep, tmp_path)
    m, keeper = keep()
    assert keeper.state.endswith(" blocks")
    m.halt()
    assert m["rbx"] == 80
    assert translated(m) == 0


def test_another_run_after_that_and_what_it_adds(keep: Kept, tmp_path: Path) -> None:
    first_run(keep, tmp_path)
    m, keeper = keep(PROGRAM.replace("hlt", "nop\n inc ebx\n hlt"))
    m.halt()
    assert m["rbx"] == 81
    assert 0 < translated(m) <= 2
    keeper.save()
    for program, result in ((PROGRAM, 80), (PROGRAM.replace("hlt", "nop\n inc ebx\n hlt"), 81)):
        m, keeper = keep(program)
        m.halt()
        assert (m["rbx"], translated(m)) == (result, 0)


def test_changed_guest_code_under_a_kept_block(keep: Kept, tmp_path: Path) -> None:
    first_run(keep, tmp_path)
    m, _ = keep(function=FUNCTION.replace("mov eax, 3", "mov eax, 4"))
    m.halt()
    assert m["rbx"] == 10 * 4 + 10 * 6
    assert translated(m) == 1


def test_a_single_bit_of_a_long_block(keep: Kept, tmp_path: Path) -> None:
    """Whichever byte of the guest's code differs, it is seen."""
    function = "\n".join(f"add eax, {1 << i}" for i in range(1, 20)) + "\n ret"
    m, keeper = keep("xor eax, eax\n call far\n hlt\n far: mov edi, 0x400000\n jmp rdi", function)
    m.halt()
    right = m["rax"]
    keeper.save()
    length = 2 + 3 * 5 + 12 * 5
    for at in range(0, length, 7):
        m, _ = keep("xor eax, eax\n call far\n hlt\n far: mov edi, 0x400000\n jmp rdi", function)
        changed = m.memory.read(FAR, 100)
        m.memory.write_u8(FAR + at, changed[at] ^ 0x10)
        m.run()
        if m["rax"] == right:
            assert translated(m) > 0


def test_the_code_at_another_physical_and_linear_address(keep: Kept, tmp_path: Path) -> None:
    first_run(keep, tmp_path)
    m, _ = keep(PROGRAM.replace(f"mov edi, {FAR}", f"mov edi, {ALIAS}"), at=FAR + 0x7000)
    m.map(ALIAS, FAR + 0x7000)
    m.halt()
    assert m["rbx"] == 80
    assert translated(m) <= 3  # those of the changed program


@pytest.mark.parametrize("memory", [16 << 20, 128 << 20])
def test_another_memory_size(keep: Kept, tmp_path: Path, memory: int) -> None:
    first_run(keep, tmp_path)
    m, _ = keep(memory=memory)
    m.halt()
    assert (m["rbx"], translated(m)) == (80, 0)


@pytest.mark.parametrize("bits", [32, 64])
def test_self_modifying_code_in_a_kept_page(keep: Kept, tmp_path: Path, bits: int) -> None:
    program = (
        f"mov ecx, 10\n xor ebx, ebx\n top: mov edi, {FAR}\n inc byte [edi+1]\n call {'rdi' if bits == 64 else 'edi'}\n"
        "add ebx, eax\n inc byte [next+1]\n next: mov edx, 1\n add ebx, edx\n dec ecx\n jnz top\n hlt"
    )
    expected = sum(3 + i for i in range(1, 11)) + sum(1 + i for i in range(1, 11))
    for number in range(2):
        m, keeper = keep(program, FUNCTION.split("\n")[0] + "\n ret", bits=bits)
        m.halt()
        assert m["rbx"] == expected
        assert (translated(m) == 0) == (number == 1)
        keeper.save()


def test_code_in_segments_that_are_not_flat_is_not_kept(keep: Kept, tmp_path: Path) -> None:
    """Which segments its mode means is told by a number that only its own run knows."""
    for _ in range(2):
        m, keeper = keep("mov eax, 5\n mov [es:0], eax\n hlt", bits=32)
        state = m.vcpu.state
        state.es.base = DATA
        m.vcpu.state = state
        m.halt()
        assert m.memory.read_u32(DATA) == 5
        assert translated(m) > 0
        keeper.save()


def test_faults_in_kept_code_are_precise(keep: Kept, tmp_path: Path) -> None:
    program = "mov eax, 7\n cdq\n xor ecx, ecx\n stc\n here: div ecx\n hlt"
    for number in range(2):
        m, keeper = keep(program)
        frame = m.fault()
        assert (frame.vector, frame.rip, frame.rflags & 0x8D5) == (0, m.labels["here"], 0x45)
        assert (translated(m) == 0) == (number == 1)
        keeper.save()


def test_kept_code_after_the_code_cache_was_full(keep: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_run(keep, tmp_path)
    m, _ = keep()
    m.halt()
    m.vcpu.blocks.flush()
    m.restart()
    m.halt()
    assert (m["rbx"], translated(m)) == (80, 0)
    monkeypatch.setattr(engine, "CODE_CACHE_SIZE", (m.vcpu.blocks._helpers_end + 4095) // 4096 * 4096 + 8192)
    m, _ = keep(PROGRAM.replace("call rdi", "xor byte [rdi+1], 1\n call rdi").replace("ecx, 20", "ecx, 2000"))
    m.halt()
    assert m["rbx"] == 1000 * 2 + 1000 * 5
    assert m.vcpu.statistics()["translation"]["code cache flushes"] > 3


# -- what is not taken ---------------------------------------------------------------------------------------


def spoil_byte(at: float) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return spoil


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def claim_much(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[40:48] = (1 << 40).to_bytes(8, "little")
    file.write_bytes(data)


def link(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        *((spoil_byte(at), "damaged") for at in (0.0, 0.01, 0.3, 0.9, 1.0)),
        (truncate, "damaged"),
        (lengthen, "damaged"),
        (claim_much, "damaged"),
        (lambda file: file.write_bytes(b""), "damaged"),
        (lambda file: file.write_bytes(b"#!/bin/sh\n"), "damaged"),
        (lambda file: file.chmod(0o620), "others may write"),
        (lambda file: file.chmod(0o602), "others may write"),
        (link, "symbolic link"),
        (pipe, "not a file"),
        (directory, "directory"),
    ],
)
def test_a_file_that_is_not_as_it_should_be(
    keep: Kept, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    """It is ignored, said so, and made anew where that can be."""
    file = first_run(keep, tmp_path)
    spoil(file)
    m, keeper = keep()
    assert keeper.state.startswith("ignored: ")
    assert reason in keeper.state
    m.halt()
    assert m["rbx"] == 80
    assert translated(m) > 3
    keeper.save()
    if spoil is directory:
        assert "cannot be written" in keeper.state
        return
    m, keeper = keep()
    m.halt()
    assert (m["rbx"], translated(m)) == (80, 0)


def test_what_is_read_and_never_served_is_given_back(keep: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_run(keep, tmp_path)
    m, _ = keep()
    cpuid, closed = m.vcpu.guest_cpuid, []
    close = kept.Archive.close
    monkeypatch.setattr(kept.Archive, "close", lambda archive: (closed.append(archive), close(archive)))
    keeper = Keeper(tmp_path / "translations", host_kind(cpuid.features, cpuid.xcr0_on_host), lambda: GUEST)
    keeper.close()
    assert len(closed) == 1


def test_a_guest_that_cannot_be_read(tmp_path: Path, machine: Make) -> None:
    m = machine("hlt")
    keeper = Keeper(tmp_path, b"", (tmp_path / "gone").read_bytes)
    with pytest.raises(FileNotFoundError):
        keeper.serve(m.vcpu.blocks)
    keeper.close()


def test_a_file_of_another_owner(keep: Kept, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(first_run(keep, tmp_path), 1, -1)
    _, keeper = keep()
    assert keeper.state == "ignored: others may write to it"


def test_a_file_of_another_version_of_the_translator(
    keep: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_run(keep, tmp_path)
    monkeypatch.setattr(kept, "translator_version", lambda: b"other")
    m, keeper = keep()
    assert keeper.state == "ignored: another version, host or guest"
    m.halt()
    keeper.save()
    m, keeper = keep()
    m.halt()
    assert translated(m) == 0


def test_a_file_of_another_guest(keep: Kept, tmp_path: Path) -> None:
    file = first_run(keep, tmp_path)
    m, keeper = keep(guest=b"another")
    assert keeper.state == "none yet"
    m.halt()
    keeper.save()
    (other,) = set(file.parent.iterdir()) - {file}
    other.write_bytes(file.read_bytes())
    _, keeper = keep(guest=b"another")
    assert keeper.state == "ignored: another version, host or guest"


def test_the_version_changes_with_any_source_of_the_translator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("translation", "x86"):
        (tmp_path / room / "inner").mkdir(parents=True)
    source = tmp_path / "x86" / "inner" / "facts.py"
    source.write_text("A = 1\n")
    monkeypatch.setattr(kept, "__file__", str(tmp_path / "translation" / "kept.py"))
    first = kept.translator_version.__wrapped__()
    source.write_text("A = 2\n")
    assert kept.translator_version.__wrapped__() != first


# -- writing -------------------------------------------------------------------------------------------------


def test_a_run_that_translated_little_writes_nothing(
    keep: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "WORTH_WRITING", 1000)
    m, keeper = keep()
    m.halt()
    keeper.save()
    assert not (tmp_path / "translations").exists()


def test_a_full_file_loses_what_is_not_used(keep: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = first_run(keep, tmp_path)
    monkeypatch.setattr(kept, "LIMIT", 100)
    m, keeper = keep("nop\n nop\n mov rax, [DATA]\n mov [DATA+8], rax\n hlt")
    m.halt()
    keeper.save()
    before = file.stat().st_size
    m, keeper = keep()
    m.halt()
    assert translated(m) > 3
    keeper.save()
    assert file.stat().st_size != before


def dummy(file: Path, fill: int, size: int = 1000) -> None:
    kept.save(file, b"", array("I", bytes(TEMPLATE_SIZE)), array("I", bytes(4 * TEMPLATE_HEADS)), [bytes([fill]) * size])


def test_old_files_go_when_there_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dummy(tmp_path / "0.kept", 0)
    monkeypatch.setattr(kept, "TOTAL_LIMIT", 3 * (tmp_path / "0.kept").stat().st_size + 100)
    left_over = tmp_path / "writing-abc"
    left_over.write_text("")
    os.utime(left_over, (0, 0))
    (tmp_path / "writing-now").write_text("")
    for number in range(1, 6):
        dummy(tmp_path / f"{number}.kept", number)
        os.utime(tmp_path / f"{number}.kept", (number * 1000, number * 1000))
        os.utime(tmp_path / "0.kept", (10_000, 10_000))  # used all the time
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.kept", "4.kept", "5.kept", "writing-now"]


def test_several_that_write_and_read_at_once(tmp_path: Path) -> None:
    """Whoever reads gets one of the files whole."""
    file = tmp_path / "x.kept"
    wanted = bytes(32)
    stop = threading.Event()

    def write(fill: int) -> None:
        while not stop.is_set():
            kept.save(
                file, wanted, array("I", bytes(TEMPLATE_SIZE)), array("I", bytes(4 * TEMPLATE_HEADS)),
                [bytes([fill]) * (10_000 * fill)],
            )  # fmt: skip

    dummy(file, 1)
    kept.save(file, wanted, array("I", bytes(TEMPLATE_SIZE)), array("I", bytes(4 * TEMPLATE_HEADS)), [b"\1" * 10_000])
    writers = [threading.Thread(target=write, args=(fill,)) for fill in (1, 2, 3)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(30):
            archive = kept.load(file, wanted)
            assert archive is not None
            images = bytes(archive.images)
            archive.close()
            assert images in [bytes([fill]) * (10_000 * fill) for fill in (1, 2, 3)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert [found.name for found in tmp_path.iterdir()] == ["x.kept"]


def test_a_restored_guest_begins_with_its_boots_translations_and_keeps_those_it_uses(
    machine: Make, keep: Kept, tmp_path: Path
) -> None:
    def restored() -> tuple[Machine, Keeper]:
        m = machine(f"mov edi, {FAR}\n xor ecx, ecx\n call rdi\n hlt")
        m.put(FUNCTION, FAR)
        return m, keeper_of(m, tmp_path / "translations", b"restored", GUEST)

    boots = first_run(keep, tmp_path)
    m, keeper = restored()
    m.halt()
    assert m["rax"] == 3
    keeper.save()
    keeper.close()
    (own,) = {*boots.parent.iterdir()} - {boots}
    assert own.stat().st_size < boots.stat().st_size, "the boot's own loop is left out"
    m, keeper = restored()
    m.halt()
    assert translated(m) == 0
    before = own.stat().st_mtime_ns, own.read_bytes()
    keeper.save()
    assert own.read_bytes() == before[1], "nothing is new"
    keeper.close()
