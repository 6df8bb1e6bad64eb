"""The default guest, fetched by a stand-in for apt, and kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
import tarfile
import threading
import time
from pathlib import Path

import pytest

from trivisor.guests.debian import DefaultGuest, GuestUnavailable, default_guest

KERNEL = b"kernel" * 1000
BUSYBOX = b"busybox" * 1000
DRIVERS = {
    "block/xen-blkback/xen-blkback.ko": b"another",
    "net/xen-netfront.ko": b"network" * 100,
    "block/xen-blkfront.ko": b"block" * 100,
    "net/veth.ko": b"another",
}
IMAGE = "linux-image-6.1.0-9-cloud-amd64"

# apt-get and apt-cache in one, on directories of control files and packages.
FAKE_APT = """\
#!/bin/sh
cd=$PWD; cd {room}
lists=machine
for word; do
    case $word in
        --config-file=*)
            while read -r key value; do
                case $key in
                    Dir::State::lists) lists=private ;;
                    Dir::State::status) status=${{value#?}}; [ -e "${{status%??}}" ] || exit 1 ;;
                esac
            done <"${{word#*=}}" ;;
        -* | *::*) ;;
        *) words="$words $word" ;;
    esac
done
set -- $words
echo "${{0##*/}} $*" >>calls
case $1 in
    update)
        [ -e offline ] && echo "W: Failed to fetch somewhere  No network" >&2
        echo "dlstatus:1:50:Fetching" ;;
    show)
        [ -e "$lists/$2" ] || exit 100
        while read -r line; do echo "$line"; done <"$lists/$2" ;;
    download)
        name=${{2%%=*}}
        while read -r key value; do [ "$key" = Version: ] && version=$value; done <"$lists/$name"
        if [ "$2" != "$name=$version" ] || ! [ -e "$name.deb" ]; then
            echo "E: Failed to fetch $name  404" >&2
            exit 100
        fi
        printf 'dlstatus:1:20.5:Fetching\\ndlstatus:1:nonsense:\\npmstatus:x\\n'
        /bin/cp "$name.deb" "$cd" ;;
esac
"""


def deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    """A .deb as deb(5) describes it."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data = tar.getvalue()
    parts = {
        "debian-binary": b"2.0\n",
        f"control.tar.{compression}": data,
        f"data.tar.{compression}": data,
    }
    whole = b"!<arch>\n"
    for name, content in parts.items():
        whole += b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name.encode(), 0, 0, 0, b"100644", len(content))
        whole += content + b"\n" * (len(content) % 2)
    return whole


class FakeApt:
    def __init__(self, room: Path) -> None:
        self.room = room
        packages = {
            "linux-image-cloud-amd64": {"Version": "6.1.9-1", "Depends": f"{IMAGE} (= 6.1.9-1)"},
            IMAGE: {"Version": "6.1.9-1", "Depends": "kmod, linux-base (>= 4.3~), initramfs-tools | other"},
            "busybox-static": {"Version": "1:1.35.0-4"},
        }
        self.know(machine=packages, private=packages)
        modules = "./lib/modules/6.1.0-9-cloud-amd64/kernel/drivers"
        files = {"./usr/share/doc": b"", "./boot/vmlinuz-6.1.0-9-cloud-amd64": KERNEL}
        self.package(IMAGE, files | {f"{modules}/{name}": content for name, content in DRIVERS.items()})
        self.package("busybox-static", {"./bin/busybox": BUSYBOX})
        commands = room / "bin"
        commands.mkdir()
        for name in ("apt-get", "apt-cache"):
            (commands / name).write_text(FAKE_APT.format(room=shlex.quote(str(room))))
            (commands / name).chmod(0o755)

    def know(self, **lists) -> None:
        """Set the control fields of the packages in the machine's lists, and in lists fetched now."""
        self.packages = lists["private"]
        for name, packages in lists.items():
            shutil.rmtree(self.room / name, ignore_errors=True)
            (self.room / name).mkdir()
            for package, fields in packages.items():
                text = "".join(f"{key}: {value}\n" for key, value in fields.items())
                (self.room / name / package).write_text(text)

    def package(self, name: str, files: dict[str, bytes], compression: str = "xz") -> None:
        (self.room / f"{name}.deb").write_bytes(deb(files, compression))

    @property
    def calls(self) -> list[str]:
        calls = self.room / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trivisor" / "debian"


@pytest.fixture
def apt(tmp_path, monkeypatch, cache) -> FakeApt:
    room = tmp_path / "apt"
    room.mkdir()
    monkeypatch.setenv("PATH", str(room / "bin"))
    return FakeApt(room)


def left_behind(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"lock"}


WHOLE = {"vmlinuz-6.1.0-9-cloud-amd64", "busybox", "xen-blkfront.ko", "xen-netfront.ko", "guest.json"}


def test_fetch_and_keep(apt, cache):
    told = []
    guest = default_guest(lambda what, part: told.append((what, part)))
    drivers = (cache / "xen-blkfront.ko", cache / "xen-netfront.ko")
    assert guest == DefaultGuest(cache / "vmlinuz-6.1.0-9-cloud-amd64", cache / "busybox", "6.1.9-1", hashlib.sha256(KERNEL).digest(), drivers)
    assert [driver.read_bytes() for driver in drivers] == [b"block" * 100, b"network" * 100]
    assert guest.kernel.read_bytes() == KERNEL
    assert guest.busybox.read_bytes() == BUSYBOX
    assert left_behind(cache) == WHOLE
    record = json.loads((cache / "guest.json").read_text())
    assert record["kernel"]["sha256"] == hashlib.sha256(KERNEL).hexdigest()
    assert (f"fetching {IMAGE} 6.1.9-1", 0.205) in told
    assert "apt-get update" not in apt.calls, "the machine's own lists did"

    calls = apt.calls
    start = time.perf_counter()
    assert default_guest(lambda *told: pytest.fail("nothing to tell")) == guest
    assert time.perf_counter() - start < 0.02
    assert apt.calls == calls


def test_a_cache_without_drivers_does_for_a_guest_without_devices(apt, cache):
    guest = default_guest()
    record = json.loads((cache / "guest.json").read_text())
    del record["drivers"]
    (cache / "guest.json").write_text(json.dumps(record))
    calls = apt.calls
    assert default_guest().drivers == () and apt.calls == calls
    assert default_guest(drivers=True) == guest and apt.calls != calls


def test_a_kernel_that_has_its_drivers_built_in(apt):
    apt.package(IMAGE, {"./boot/vmlinuz-6.1.0-9-cloud-amd64": KERNEL})
    assert default_guest(drivers=True).drivers == ()


def test_cache_needs_no_apt(apt, cache, monkeypatch):
    guest = default_guest()
    monkeypatch.setenv("PATH", "/nowhere")
    assert default_guest() == guest


def test_machine_without_package_lists(apt):
    apt.know(machine={}, private=apt.packages)
    assert default_guest().version == "6.1.9-1"
    assert apt.calls.count("apt-get update") == 1


def test_machine_with_old_package_lists(apt):
    old = json.loads(json.dumps(apt.packages).replace("6.1.0-9", "6.1.0-8").replace("6.1.9-1", "6.1.8-1"))
    apt.know(machine=old, private=apt.packages)
    assert default_guest().version == "6.1.9-1"


def test_kernel_split_into_further_packages(apt):
    binary = "linux-binary-6.1.0-9-cloud-amd64"
    packages = apt.packages | {
        IMAGE: {"Version": "6.1.9-1", "Depends": f"linux-base, {binary} (= 6.1.9-1)"},
        binary: {"Version": "6.1.9-1"},
    }
    apt.know(machine=packages, private=packages)
    apt.package(binary, {"boot/vmlinuz-6.1.0-9-cloud-amd64": KERNEL}, "gz")
    assert default_guest().kernel.read_bytes() == KERNEL


@pytest.mark.parametrize("damage", ["kernel shorter", "busybox gone", "driver gone", "record half", "another record"])
def test_damaged_cache_is_fetched_again(apt, cache, damage):
    guest = default_guest()
    if damage == "kernel shorter":
        os.truncate(guest.kernel, 100)
    elif damage == "busybox gone":
        guest.busybox.unlink()
    elif damage == "driver gone":
        guest.drivers[0].unlink()
    elif damage == "record half":
        os.truncate(cache / "guest.json", 50)
    else:
        (cache / "guest.json").write_text('{"kernel": 1, "busybox": []}')
    assert default_guest() == guest
    assert guest.kernel.read_bytes() == KERNEL
    assert guest.busybox.read_bytes() == BUSYBOX


def test_leftovers_of_a_killed_fetch_go_away(apt, cache):
    (cache / "fetch-old" / "deep").mkdir(parents=True)
    default_guest()
    assert left_behind(cache) == WHOLE


def test_two_at_once_fetch_once(apt, cache):
    guests = []
    threads = [threading.Thread(target=lambda: guests.append(default_guest())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(guests) == 3
    assert len(set(guests)) == 1
    assert len([call for call in apt.calls if "download" in call]) == 2


def unavailable() -> str:
    with pytest.raises(GuestUnavailable) as caught:
        default_guest()
    message = str(caught.value)
    assert "\n" not in message
    assert "IMAGE and --initrd" in message
    return message


def test_no_network(apt, cache):
    apt.know(machine={}, private={})
    (apt.room / "offline").touch()
    assert "Failed to fetch somewhere No network" in unavailable()
    assert left_behind(cache) == set()


def test_sources_without_the_packages(apt):
    apt.know(machine={}, private={})
    assert "no package linux-image-cloud-amd64" in unavailable()


def test_package_that_cannot_be_had(apt):
    (apt.room / "busybox-static.deb").unlink()
    assert "Failed to fetch busybox-static 404" in unavailable()


@pytest.mark.parametrize("content", [b"", b"not a package", deb({"./boot/config": b""}), deb({})[:-100]])
def test_package_that_is_not_what_it_should_be(apt, cache, content):
    (apt.room / f"{IMAGE}.deb").write_bytes(content)
    unavailable()
    assert left_behind(cache) == set()


def test_no_apt(cache, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no apt-get here" in unavailable()


def test_cache_that_cannot_be_written(apt, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot keep the default guest" in unavailable()


def test_relative_cache_home_is_ignored(apt, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_guest().kernel.is_relative_to(tmp_path / "home" / ".cache" / "trivisor")
