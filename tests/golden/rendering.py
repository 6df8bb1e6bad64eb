"""Translated code as text: guest instructions, then host instructions with the state block's fields by name."""

from __future__ import annotations

import re
from typing import NamedTuple

from iced_x86 import CpuidFeature, Decoder, Formatter, FormatterSyntax

from tests.golden.corpus import SAMPLES, Sample
from trivisor.translation.layout import OFFSETS
from trivisor.translation.modes import Mode
from trivisor.translation.translator.block import Translation
from trivisor.translation.translator.traces import Judge
from trivisor.translation.translator.translator import Translator
from trivisor.x86.assembler import assemble

_RIP = 0x401000
_LOOKUP = 0x100
_START = 0x10000
_FEATURES = frozenset(n for name, n in vars(CpuidFeature).items() if isinstance(n, int) and not name.startswith("_"))
_NAMES = {offset: name for name, offset in sorted(OFFSETS.items(), reverse=True)}
_DISPLACEMENT = re.compile(r"(rsp(?:\+r1[01](?:\*8)?)?)\+([0-9A-F]+)h?\]")


class _Cache(NamedTuple):
    """As much of a code cache as translating looks at."""

    used: int = _START


def _named(text: str) -> str:
    """Displacements from rsp by the field that they are of: the fields move, and that is no change here."""

    def name(match: re.Match[str]) -> str:
        offset = int(match[2], 16)
        field = max((at for at in _NAMES if at <= offset), default=0)
        rest = f"+{offset - field}" if offset > field else ""
        return f"{match[1]}+{_NAMES[field]}{rest}]"

    return _DISPLACEMENT.sub(name, text.replace("[rsp]", "[rsp+0h]"))


def _code_parts(made: Translation) -> list[tuple[int, int]]:
    """(offset, end) of what is code: descriptions of accesses and numbers of links stand between."""
    code, parts, at = bytes(made.code), [], 0
    while at < len(code):
        decoder = Decoder(64, code[at:], ip=at)
        for instruction in decoder:
            if instruction.is_call_near_indirect and not instruction.is_invalid:
                break
        end = at + decoder.position
        parts.append((at, end))
        at = end + _described(made, end)
    return parts


def _described(made: Translation, end: int) -> int:
    """Bytes of data that follow a call of a helper that ends at `end`."""
    if any(link.number == end for link in made.links):
        return 4
    call = bytes(made.code[:end])
    for field, size in (("MISS", 24), ("CALL_OUT", 8), ("ESCAPE", 12), ("SYSCALL", 12)):
        if call.endswith(assemble(f"call qword [rsp+{OFFSETS[field]}]", bits=64).code):
            return size
    return 0


def _judge(sample: Sample) -> Judge:
    turns = iter(sample.ways)

    def judge(ways: tuple[int, ...]) -> int | None:
        turn = next(turns, None)
        return None if turn is None else ways[turn]

    return judge


def render(sample: Sample) -> str:
    """The sample, its guest code and what becomes of it."""
    program = assemble(sample.source, bits=64, origin=_RIP)
    code = program.code.ljust(64, b"\x90")
    translator = Translator(_Cache(), _LOOKUP, _FEATURES, 832, None)  # type: ignore[arg-type]
    mode = Mode(user=sample.user)
    made = translator.translate(mode, _RIP, code)
    if sample.tuned:
        path, _ = translator.trace(mode, _RIP, code, _judge(sample))
        tuned = translator.tune(mode, path, code)
        assert tuned is not None, sample.name
        made = tuned
    formatter = Formatter(FormatterSyntax.NASM)
    lines = [f"# {sample.name}"]
    lines += [f"    {formatter.format(one)}" for one in Decoder(64, code[: made.length], ip=_RIP)]
    entries = {made.parked: "parked", made.polled: "polled", made.body: "body", 0: "checked"}
    lines.append("=>")
    for start, end in _code_parts(made):
        for one in Decoder(64, bytes(made.code[start:end]), ip=start):
            if one.ip in entries:
                lines.append(f"  {entries[one.ip]}:")
            lines.append(f"    {one.ip:3x}  {_named(formatter.format(one))}")
        lines.append("         --")
    return "\n".join(lines[:-1]) + "\n"


def render_all() -> str:
    """The whole corpus."""
    return "\n".join(render(sample) for sample in SAMPLES)
