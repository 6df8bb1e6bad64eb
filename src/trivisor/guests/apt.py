"""The machine's own apt, driven without root and without touching the machine's state.

Sources, keyrings, proxies and pinning stay the machine's (apt.conf(5),
sources.list(5)); everything that apt would write goes to a directory of ours.
apt itself checks each package against the signed package lists.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO

from debian.deb822 import Deb822

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the done part (0 to 1), None where that is unknown."""

_CONFIGURATION = """\
#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Get::AllowUnauthenticated "false";
APT::Sandbox::User "";
Acquire::GzipIndexes "true";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
Dir::Cache "{directory}/cache/";
Dir::Cache::archives "archives/";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::State::status "{directory}/status";
"""
_PRIVATE_LISTS = 'Dir::State::lists "{directory}/lists/";\n'
_LONGEST_COMPLAINT = 200


class AptError(RuntimeError):
    """apt could not do it; the message is one line of apt's own."""


def available() -> bool:
    """Whether this machine has apt."""
    return all(shutil.which(command) for command in ("apt-get", "apt-cache"))


class PrivateApt:
    """apt with its state in `directory`, at first on the machine's package lists."""

    def __init__(self, directory: Path) -> None:
        for name in ("cache/archives/partial", "lists/partial"):
            (directory / name).mkdir(parents=True)
        (directory / "status").touch()
        self._directory = directory
        self._configuration = directory / "apt.conf"
        self._configuration.write_text(_CONFIGURATION.format(directory=directory))
        self._complaint = ""

    def update(self, progress: Progress) -> None:
        """Get package lists of our own, and use them from here on.

        A source that fails is no error as long as the others have what is asked
        for later; its complaint is kept to explain what is then not found.
        """
        with self._configuration.open("a") as file:
            file.write(_PRIVATE_LISTS.format(directory=self._directory))
        _, self._complaint = self._run(["apt-get", "update"], "fetching package lists", progress)

    def show(self, package: str) -> dict[str, str]:
        """Return the control fields of the newest version that apt would install; raises AptError."""
        found = subprocess.run(
            ["apt-cache", f"--config-file={self._configuration}", "show", "--no-all-versions", package],
            capture_output=True,
            check=False,
        )
        fields = dict(Deb822(found.stdout)) if found.returncode == 0 else {}
        if "Version" not in fields:
            raise AptError(self._complaint or f"this machine's apt sources have no package {package}")
        return {str(key): str(value) for key, value in fields.items()}

    def download(self, package: str, version: str, progress: Progress) -> Path:
        """Fetch one package, checked by apt, and return the .deb file; raises AptError."""
        target = self._directory / package
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        command = ["apt-get", "download", f"{package}={version}"]
        status, complaint = self._run(command, f"fetching {package} {version}", progress, target)
        files = sorted(target.glob("*.deb"))
        if status or not files:
            raise AptError(complaint or f"apt-get download {package} ended with status {status}")
        return files[0]

    def _run(
        self, command: list[str], what: str, progress: Progress, directory: Path | None = None
    ) -> tuple[int, str]:
        """Run apt-get, reporting its progress; return its exit status and its first complaint."""
        options = [f"--config-file={self._configuration}", "-qq", "-o", "APT::Status-Fd=1"]
        progress(what, None)
        with (self._directory / "complaints").open("w+", errors="replace") as complaints:
            process = subprocess.Popen(
                [command[0], *options, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                errors="replace",
                cwd=directory or self._directory,
            )
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if (part := _done_part(line)) is not None:
                        progress(what, part)
                status = process.wait()
            finally:
                process.kill()
                process.wait()
            complaints.seek(0)
            return status, _first_complaint(complaints)


def _done_part(line: str) -> float | None:
    """Read a line such as "dlstatus:1:20.5:Retrieving file 1 of 2" (apt, README.progress-reporting)."""
    fields = line.split(":", 3)
    if len(fields) < 3 or fields[0] != "dlstatus":
        return None
    try:
        return min(max(float(fields[2]) / 100, 0.0), 1.0)
    except ValueError:
        return None


def _first_complaint(lines: IO[str]) -> str:
    """Return the first error, or else the first failed fetch, without its "E:"."""
    warnings = ""
    for line in lines:
        kind, _, text = line.strip().partition(": ")
        if kind == "E":
            return _one_line(text)
        if kind == "W" and not warnings and "Failed to fetch" in text:
            warnings = _one_line(text)
    return warnings


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_COMPLAINT]
