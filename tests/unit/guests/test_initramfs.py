"""The default user space: the archive as the kernel reads it, and /init as a shell reads it."""

from __future__ import annotations

import os
import stat
import subprocess

import pytest

from trivisor.guests import cpio
from trivisor.guests.initramfs import applets, default_initramfs

NAMES = [b"[", b"[[", *(b"applet%d" % number for number in range(40)), b"sh"]
BUSYBOX = b"\x7fELF code\0" + b"\0".join([b"", *NAMES]) + b"\0\0more\0"


def unpack(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Read a newc archive by buffer-format.rst: name to mode, content and device."""
    files, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = (at + 110 + name_size + 3) & ~3
        at = (start + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return files
        assert name.decode() not in files
        files[name[:-1].decode()] = (mode, archive[start : start + size], (fields[9], fields[10]))


def init(*arguments, **options) -> bytes:
    return unpack(default_initramfs(BUSYBOX, *arguments, **options))["init"][1]


def test_archive_round_trip():
    entries = [
        cpio.directory("d"),
        cpio.regular("d/odd", b"12345", 0o600),
        cpio.symlink("d/link", "../odd"),
        cpio.character_device("null", 1, 3, 0o666),
    ]
    assert unpack(cpio.archive(entries)) == {
        "d": (0o40755, b"", (0, 0)),
        "d/odd": (0o100600, b"12345", (0, 0)),
        "d/link": (0o120777, b"../odd", (0, 0)),
        "null": (0o20666, b"", (1, 3)),
    }


def test_inodes_differ():
    archive = cpio.archive([cpio.regular("a", b""), cpio.regular("b", b"")])
    assert archive[6:14] != archive[112 + 6 : 112 + 14], "equal inodes would make one a link to the other"


def test_what_the_default_user_space_holds():
    files = unpack(default_initramfs(BUSYBOX))
    assert files["bin/busybox"][:2] == (0o100755, BUSYBOX)
    assert files["bin/sh"][:2] == (0o120777, b"busybox")
    assert files["dev/console"] == (0o20600, b"", (5, 1))
    assert stat.S_IMODE(files["init"][0]) == 0o755
    assert files["init"][1].startswith(b"#!/bin/sh\n")
    made = set()
    for name in files:
        parent = os.path.dirname(name)
        assert not parent or parent in made, "the kernel makes no missing directories"
        made.add(name)


def test_archive_depends_on_its_input_alone():
    assert default_initramfs(BUSYBOX) == default_initramfs(BUSYBOX)


def test_applets_come_from_the_binary():
    assert applets(BUSYBOX) == [name.decode() for name in NAMES]
    assert "sh" in applets(b"another program")
    assert applets(b"\0[\0[[\0" + b"\xff" * 100) == applets(b"")


@pytest.mark.parametrize("options", [{}, {"interactive": True}, {"command": ["x"], "marker": b"ab"}])
def test_init_is_good_shell(options):
    script = init(**options)
    subprocess.run(["sh", "-n"], input=script, check=True)
    assert script.count(b"poweroff") >= 1
    assert b"{" not in script.replace(b"${", b"")


def test_terminal_size():
    assert b"stty rows 40 cols 132" in init(interactive=True, terminal_size=(40, 132))
    assert b"stty rows" not in init(interactive=True)


def run_init(command: list[str], marker: bytes) -> bytes:
    """Run the command part of /init on the host, its devices left out."""
    script = init(command, marker=marker)
    script = script[script.index(b"first=") : script.index(b"exec poweroff")]
    # dash has no `exec --`, which busybox needs for commands that begin with "-".
    return subprocess.run(["bash"], input=script, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["plain"],
        ["", " two  words ", "it's", '"$HOME" `id` \\n', "*", "a\nb\n", "-n", "--"],
        [os.fsdecode(bytes(range(1, 256)))],
    ],
)
def test_arguments_arrive_as_they_are(arguments):
    output = run_init(["printf", "<%s>", *arguments], b"m1m2")
    expected = b"".join(b"<%s>" % os.fsencode(argument) for argument in arguments)
    assert output == b"m1m2:begin\n" + expected + b"m1m2:end:0\n"


def test_status_and_signals():
    assert run_init(["sh", "-c", "exit 7"], b"m1m2").endswith(b"m1m2:end:7\n")
    assert run_init(["sh", "-c", "kill -9 $$"], b"m1m2") == b"m1m2:begin\nm1m2:end:137\n"
    assert run_init(["cat"], b"m1m2") == b"m1m2:begin\nm1m2:end:0\n", "standard input is empty"


def test_printing_init_prints_no_mark():
    assert b"m1m2" not in init(["cat", "/init"], marker=b"m1m2")


@pytest.mark.parametrize(
    ("command", "marker", "message"),
    [([], b"ab", "empty"), (["a\0b"], b"ab", "NUL"), (["a"], b"", "marker"), (["a"], b"a;b", "marker")],
)
def test_what_cannot_be_run(command, marker, message):
    with pytest.raises(ValueError, match=message):
        default_initramfs(BUSYBOX, command, marker=marker)
