"""The default guest's files out of Debian's packages."""

from __future__ import annotations

import lzma
import re
import shutil
import tarfile
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


def fetch_files(directory: Path, progress: Progress) -> tuple[str, Path, Path]:
    """Put kernel and busybox into `directory`; return the kernel's package version and the two paths.

    `directory` is for apt's state too, which is of no use afterwards.  Raises AptError.
    """
    source = PrivateApt(directory)
    try:
        version, kernel, busybox = _download(source, progress)
    except AptError:  # the machine has no package lists, or old ones
        source.update(progress)
        version, kernel, busybox = _download(source, progress)
    progress("unpacking", None)
    return version, _extract(kernel, _KERNEL_FILE, directory), _extract(busybox, _BUSYBOX_FILE, directory)


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


def _extract(package: Path, wanted: re.Pattern[str], directory: Path) -> Path:
    """Write the one file of the package whose path is `wanted` into `directory`, under the name's group 1.

    Unpacking stops there: most of a kernel package is modules.
    """
    try:
        with DebFile(filename=str(package)) as file:
            archive = file.data.tgz()
            for member in archive:
                name = wanted.fullmatch(str(member.name))
                content = archive.extractfile(member) if name and member.isreg() else None
                if name and content:
                    target = directory / name[1]
                    with target.open("wb") as output:
                        shutil.copyfileobj(content, output, 1 << 20)
                    return target
    except (ArError, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise AptError(f"{package.name} is damaged") from error
    raise AptError(f"{package.name} holds no file {wanted.pattern}")
