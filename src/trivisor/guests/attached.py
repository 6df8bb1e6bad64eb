"""Disks and the network in the default user space: drivers loaded, devices waited for, an address asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trivisor.guests import cpio

# What a front end has to say to its back end takes milliseconds; a driver that is not there, for ever.
_WAIT = """\
tries=0
until {condition}; do
    tries=$((tries + 1))
    [ $tries -le 200 ] || {{ echo "trivisor: no {what}"; break; }}
    sleep 0.02
done
"""

_LEASE = b"""\
#!/bin/sh
case $1 in
    bound | renew)
        ifconfig "$interface" "$ip" netmask "$subnet"
        [ -z "$router" ] || route add default gw "${router%% *}"
        for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf ;;
esac
"""

_MTU = 65520  # the network is in this machine, and each packet costs more than its bytes
_NETWORK = """\
ifconfig lo up
ifconfig eth0 mtu {mtu} up
{carrier}\
udhcpc -q -n -f -t 5 -T 1 -i eth0 -s /etc/udhcpc.script >/dev/null 2>&1 || echo "trivisor: no lease for eth0"
"""


class Attached(NamedTuple):
    """What a machine has beyond its console.

    `drivers` are the kernel's modules to load, in this order; `disks` the names
    of disks in /dev; with a `network`, eth0 is set up by DHCP.
    """

    drivers: Sequence[Path] = ()
    disks: Sequence[str] = ()
    network: bool = False

    def script(self) -> bytes:
        """The part of /init that makes it ready."""
        lines = [f"insmod /lib/{driver.name}\n" for driver in self.drivers]
        lines += [_WAIT.format(condition=f"[ -b /dev/{disk} ]", what=disk) for disk in self.disks]
        if self.network:
            carrier = 'read -r up 2>/dev/null </sys/class/net/eth0/carrier && [ "$up" = 1 ]'
            lines.append(_NETWORK.format(mtu=_MTU, carrier=_WAIT.format(condition=carrier, what="carrier on eth0")))
        return "".join(lines).encode()

    def entries(self) -> Iterator[cpio.Entry]:
        """Its files; raises OSError for a driver that cannot be read."""
        if self.drivers:
            yield cpio.directory("lib")
        for driver in self.drivers:
            yield cpio.regular(f"lib/{driver.name}", driver.read_bytes())
        if self.network:
            yield cpio.regular("etc/udhcpc.script", _LEASE, 0o755)
            yield cpio.regular("etc/hosts", b"127.0.0.1 localhost\n")


NOTHING_ATTACHED = Attached()
