"""What is booted for what was asked: completed by the default guest, refused when it does not go together."""

import struct
from pathlib import Path

import pytest

from tests.unit.boot.test_xen_notes import NOTES, kernel
from trivisor.boot import ImageError
from trivisor.guests import debian
from trivisor.guests.debian import DefaultGuest
from trivisor.monitor.attachments import Disk, Network
from trivisor.monitor.plan import BadPlan, Wish, make_hardware, make_plan


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a default guest and kernels that are just recognisable."""
    (tmp_path / "busybox").write_bytes(b"\x7fELF busybox")
    linux = bytearray(1024)
    linux[0x1FE:0x206] = b"\x55\xaa\xeb\x66HdrS"
    (tmp_path / "debian").write_bytes(linux)
    (tmp_path / "linux").write_bytes(linux)
    (tmp_path / "multiboot").write_bytes(struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF))
    (tmp_path / "xen-blkfront.ko").write_bytes(b"driver")
    guest = DefaultGuest(tmp_path / "debian", tmp_path / "busybox", "6.1", bytes(32), (tmp_path / "xen-blkfront.ko",))
    monkeypatch.setattr(debian, "default_guest", lambda progress, drivers: guest)
    return tmp_path


def no_network(progress: object, drivers: bool) -> DefaultGuest:
    raise debian.GuestUnavailable("no network")


def test_nothing_asked_for_is_the_default_guest(files: Path) -> None:
    plan = make_plan(Wish(append="debug"))
    assert plan.kernel == files / "debian"
    assert b"A shell on busybox" in plan.initrd
    assert plan.command_line.startswith("console=ttyS0") and plan.command_line.endswith(" debug")
    assert plan.marker == b""


def test_without_a_terminal_the_guest_reports(files: Path) -> None:
    assert b"MemTotal" in make_plan(Wish(interactive=False)).initrd


def test_a_command_gets_a_marker_that_is_new_each_time(files: Path) -> None:
    first, second = (make_plan(Wish(command=["uname", "-r"])) for _ in range(2))
    assert b"'uname' '-r'" in first.initrd
    assert first.marker and first.marker != second.marker
    assert "quiet" in first.command_line


def test_under_direct_execution_linux_keeps_its_lock_prefixes(files: Path) -> None:
    for wish in (Wish(append="x"), Wish(command=["true"]), Wish(initrd=files / "my.cpio")):
        assert "noreplace-smp" not in make_plan(wish).command_line.split()
        assert "noreplace-smp" in make_plan(wish._replace(engine="direct")).command_line.split()
    own = Wish(kernel=files / "linux", initrd=files / "my.cpio", append="quiet", engine="direct")
    assert make_plan(own).command_line == "quiet", "which is the owner's alone"


def test_a_linux_kernel_without_initrd_gets_the_default_user_space(files: Path) -> None:
    plan = make_plan(Wish(kernel=files / "linux", command=["true"]))
    assert plan.kernel == files / "linux"
    assert b"'true'" in plan.initrd


def test_disks_come_with_their_driver_and_are_waited_for(files: Path) -> None:
    hardware = make_hardware((), "", ["a.img,readonly", files / "b,c.img", "d,readonly.img"])
    assert hardware.disks == (
        Disk(Path("a.img"), readonly=True), Disk(files / "b,c.img"), Disk(Path("d,readonly.img"))
    )  # fmt: skip
    plan = make_plan(Wish(hardware=hardware))
    assert isinstance(plan.initrd, bytes)
    assert b"insmod /lib/xen-blkfront.ko" in plan.initrd and b"driver" in plan.initrd
    assert all(b"/dev/" + name in plan.initrd for name in (b"xvda", b"xvdb", b"xvdc"))
    assert b"insmod" not in make_plan(Wish(hardware=hardware, kernel=files / "linux")).initrd
    assert b"insmod" not in make_plan(Wish()).initrd
    with pytest.raises(BadPlan, match="17 disks are too many"):
        make_hardware((), "", ["x"] * 17)


def test_a_network_is_set_up_by_dhcp(files: Path) -> None:
    hardware = make_hardware((), "", network="user,forward=8080:80,forward=2222:22")
    assert hardware.network == Network(((8080, 80), (2222, 22)))
    plan = make_plan(Wish(hardware=hardware))
    assert isinstance(plan.initrd, bytes)
    assert b"insmod /lib/xen-blkfront.ko" in plan.initrd and b"udhcpc -q" in plan.initrd
    assert make_hardware((), "", network="user").network == Network()
    for name in ("tap", "", "user,", "user,forward=80", "user,forward=0:80", "user,forward=1:65536", "user,x=1:2"):
        with pytest.raises(BadPlan):
            make_hardware((), "", network=name)


def test_firmware_is_all_that_is_booted(files: Path) -> None:
    plan = make_plan(Wish(firmware=files / "bios.bin"))
    assert plan.is_firmware
    assert plan.kernel == files / "bios.bin"
    for wish in (Wish(command=["true"]), Wish(kernel=files / "linux"), Wish(append="quiet"), Wish(initrd=files / "a")):
        with pytest.raises(BadPlan, match="firmware"):
            make_plan(wish._replace(firmware=files / "bios.bin"))


def test_own_kernel_and_initrd_need_nothing_else(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "default_guest", no_network)
    plan = make_plan(Wish(kernel=files / "linux", initrd=files / "my.cpio", append="quiet"))
    assert (plan.kernel, plan.initrd, plan.command_line) == (files / "linux", files / "my.cpio", "quiet")


def test_own_initrd_under_the_default_kernel_keeps_its_console(files: Path) -> None:
    plan = make_plan(Wish(initrd=files / "my.cpio", append="x"))
    assert (plan.kernel, plan.initrd) == (files / "debian", files / "my.cpio")
    assert plan.command_line.startswith("console=ttyS0") and plan.command_line.endswith(" x")


def test_a_multiboot_kernel_gets_its_modules_and_nothing_of_ours(files: Path, monkeypatch) -> None:
    monkeypatch.setattr(debian, "default_guest", no_network)
    modules = ((Path("a"), "x"),)
    plan = make_plan(Wish(kernel=files / "multiboot", modules=modules))
    assert (plan.initrd, plan.command_line, plan.modules) == (None, "", modules)


@pytest.mark.parametrize("system", ["XTF", "Mini-OS", "linux"])
def test_a_kernel_of_another_system_for_xen_gets_nothing_of_ours(files: Path, system: str) -> None:
    (files / "kernel").write_bytes(kernel({**NOTES, 6: system.encode() + b"\0"}))
    plan = make_plan(Wish(kernel=files / "kernel", append="x"))
    if system == "linux":
        assert plan.initrd is not None and plan.command_line.startswith("console=ttyS0")
        return
    assert (plan.initrd, plan.command_line) == (None, "x")
    for more in ({"command": ["true"]}, {"modules": ((Path("a"), "x"),)}, {"waiting": True}):
        with pytest.raises(BadPlan):
            make_plan(Wish(kernel=files / "kernel", **more))


@pytest.mark.parametrize(
    "wish",
    [
        {"kernel": "multiboot", "command": ["true"]},
        {"kernel": "linux", "modules": ((Path("m"), ""),)},
        {"modules": ((Path("m"), ""),)},
        {"initrd": "my.cpio", "command": ["true"]},
        {"command": []},
    ],
)
def test_what_does_not_go_together_is_refused(files: Path, wish: dict) -> None:
    paths = {name: files / value for name, value in wish.items() if isinstance(value, str)}
    with pytest.raises(BadPlan):
        make_plan(Wish(**{**wish, **paths}))


def test_a_kernel_that_is_none_is_refused_before_anything_is_fetched(files: Path, monkeypatch) -> None:
    monkeypatch.setattr(debian, "default_guest", no_network)
    with pytest.raises(ImageError):
        make_plan(Wish(kernel=files / "missing"))
    with pytest.raises(ImageError):
        make_plan(Wish(kernel=files / "busybox"))
