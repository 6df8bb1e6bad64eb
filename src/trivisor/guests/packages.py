"""The default guest's files out of Debian's packages."""

from __future__ import annotations

import lzma
import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from debian.arfile import ArError
from debian.debfile import DebFile

from trivisor.guests.apt import AptError, PrivateApt, Progress

_KERNEL_PACKAGE = "linux-image-cloud-amd64"
_BUSYBOX_PACKAGE = "busybox-static"
# The package that everyone names only depends on the one of the current version.
_KERNEL_DEPENDENCY = re.compile(r"(?:^|,)\s*(linux-(?:image|binary)-[a-z0-9.+~-]+)")
_LONGEST_DEPENDENCY_CHAIN = 4
_KERNEL_FILE = re.compile(r"(?:\./)?boot/(vmlinuz-[A-Za-z0-9.+~_-]+)")
_BUSYBOX_FILE = re.compile(r"(?:\./)?(?:usr/)?bin/(busybox)")
# Drivers of devices that machines have here, where the kernel has them as modules.
_DRIVER_FILES = tuple(
    re.compile(rf"(?:\./)?(?:usr/)?lib/modules/[^/]+/kernel/drivers/{kind}/({name}\.ko)")
    for kind, name in (("block", "xen-blkfront"), ("net", "xen-netfront"))
)


@dataclass(frozen=True, slots=True)
class FetchedFiles:
    """The default guest's files; `version` is that of the kernel's package."""

    version: str
    kernel: Path
    busybox: Path
    drivers: tuple[Path, ...]


def fetch_files(directory: Path, progress: Progress) -> FetchedFiles:
    """Put kernel, drivers and busybox into `directory`.

    `directory` is for apt's state too, which is of no use afterwards.  Raises AptError.
    """
    source = PrivateApt(directory)
    try:
        version, kernel, busybox = _download(source, progress)
    except AptError:  # the machine has no package lists, or old ones
        source.update(progress)
        version, kernel, busybox = _download(source, progress)
    progress("unpacking", None)
    image, *drivers = _extract(kernel, directory, _KERNEL_FILE, _DRIVER_FILES)
    return FetchedFiles(version, image, _extract(busybox, directory, _BUSYBOX_FILE)[0], tuple(drivers))


def _download(source: PrivateApt, progress: Progress) -> tuple[str, Path, Path]:
    """Return the kernel's package version, and the packages with the kernel and with busybox."""
    package, version = _kernel_package(source)
    kernel = source.download(package, version, progress)
    busybox = source.download(_BUSYBOX_PACKAGE, source.show(_BUSYBOX_PACKAGE)["Version"], progress)
    return version, kernel, busybox


def _kernel_package(source: PrivateApt) -> tuple[str, str]:
    """Follow the dependencies to the package that holds the kernel; return its name and version."""
    name = _KERNEL_PACKAGE
    for _ in range(_LONGEST_DEPENDENCY_CHAIN):
        fields = source.show(name)
        dependency = _KERNEL_DEPENDENCY.search(fields.get("Depends", ""))
        if dependency is None:
            return name, fields["Version"]
        name = dependency[1]
    raise AptError(f"the dependencies of {_KERNEL_PACKAGE} lead to no kernel")


def _extract(
    package: Path, directory: Path, wanted: re.Pattern[str], optional: tuple[re.Pattern[str], ...] = ()
) -> list[Path]:
    """Write files of the package into `directory`: the one whose path is `wanted`, then those `optional` ones it has.

    They are named by their pattern's group 1.  Unpacking stops once all are found.
    """
    found: dict[re.Pattern[str], Path] = {}
    missing = [wanted, *optional]
    try:
        with DebFile(filename=str(package)) as file:
            archive = file.data.tgz()
            for member in archive:
                pattern = next((one for one in missing if one.fullmatch(str(member.name))), None)
                content = archive.extractfile(member) if pattern and member.isreg() else None
                if pattern is None or content is None:
                    continue
                name = pattern.fullmatch(str(member.name))
                assert name is not None
                target = directory / name[1]
                with target.open("wb") as output:
                    shutil.copyfileobj(content, output, 1 << 20)
                found[pattern] = target
                missing.remove(pattern)
                if not missing:
                    break
    except (ArError, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise AptError(f"{package.name} is damaged") from error
    if wanted not in found:
        raise AptError(f"{package.name} holds no file {wanted.pattern}")
    return [found[pattern] for pattern in (wanted, *optional) if pattern in found]
