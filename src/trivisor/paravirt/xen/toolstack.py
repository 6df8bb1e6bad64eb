"""What a toolstack does for a new domain: its part of the store (Xen, docs/misc/xenstore-paths.pandoc)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trivisor.paravirt.xen.xenstore.store import Store

BACK_END = "/local/domain/0/backend"

_CONTROL = tuple(f"control/{name}" for name in ("feature-poweroff", "feature-reboot", "feature-suspend", "sysrq"))
"""Where the guest tells what it can be asked for."""
DISK_NAMES = tuple(f"xvd{letter}" for letter in "abcdefghijklmnop")
"""What Linux calls the disks, in their order (docs/man/xen-vbd-interface.7.pandoc)."""
NETWORK_NAME = "eth0"
"""What it calls the network card."""
_MAC = "00:16:3e:00:00:{:02x}"
"""Of Xen's own range."""
_DISK_MAJOR, _DISK_MINORS = 202, 16


def home(domain: int) -> str:
    """The domain's own part of the store."""
    return f"/local/domain/{domain}"


def introduce(store: Store, domain: int, pages: int) -> None:
    """Make the domain's home: it may read it all, and write where it is to."""
    own = home(domain)
    readable = ((0, "n"), (domain, "r"))
    writable = ((domain, "n"),)
    for path in ("/local", "/local/domain", "/local/domain/0", BACK_END, "/vm", "/tool"):
        store.make(path)
        store.set_permissions(path, ((0, "r"),))
    store.make(own)
    store.set_permissions(own, readable)
    values = {
        "domid": str(domain),
        "name": "guest",
        "memory/target": str(pages * 4),
        "memory/static-max": str(pages * 4),
        "cpu/0/availability": "online",
        "control/platform-feature-multiprocessor-suspend": "0",
    }
    for name, value in values.items():
        store.write(f"{own}/{name}", value)
    for name in ("control/shutdown", *_CONTROL, "device", "data", "attr", "error", "drivers", "feature"):
        store.make(f"{own}/{name}")
        store.set_permissions(f"{own}/{name}", writable)


def add_device(
    store: Store, domain: int, kind: str, number: int, front: dict[str, str], back: dict[str, str]
) -> tuple[str, str]:
    """Introduce a split device; returns the paths of its front and back ends.  Both begin as initialising (1)."""
    front_path = f"{home(domain)}/device/{kind}/{number}"
    back_path = f"{BACK_END}/{kind}/{domain}/{number}"
    store.make(front_path)
    store.set_permissions(front_path, ((domain, "n"), (0, "r")))
    store.make(back_path)
    store.set_permissions(back_path, ((0, "n"), (domain, "r")))
    common = {"state": "1"}
    for name, value in {"frontend": front_path, "frontend-id": str(domain), **back, **common}.items():
        store.write(f"{back_path}/{name}", value)
    for name, value in {"backend": back_path, "backend-id": "0", **front, **common}.items():
        store.write(f"{front_path}/{name}", value)
        store.set_permissions(f"{front_path}/{name}", ((domain, "n"), (0, "r")))
    return front_path, back_path


def add_disk(store: Store, domain: int, number: int, *, readonly: bool) -> tuple[str, str]:
    """Introduce the disk `DISK_NAMES[number]`."""
    device = _DISK_MAJOR << 8 | number * _DISK_MINORS
    front = {"virtual-device": str(device), "device-type": "disk"}
    back = {"mode": "r" if readonly else "w", "device-type": "disk", "dev": DISK_NAMES[number], "online": "1"}
    return add_device(store, domain, "vbd", device, front, back)


def add_network(store: Store, domain: int) -> tuple[str, str]:
    """Introduce the network card."""
    card = {"handle": "0", "mac": _MAC.format(domain)}
    return add_device(store, domain, "vif", 0, card, {**card, "online": "1"})
