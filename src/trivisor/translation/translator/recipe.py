"""How one guest instruction becomes host code: a recipe, and its variants by what happens to the flags.

Guest flags live in the host's flags.  A TLB check destroys those, so where
they are still needed they are parked first (`FLAGS_AX`), and restored only when
an instruction that reads them or changes some of them comes along.  A recipe is
turned into bytes once for each way that it meets the flags, and is then reused
for every instruction with the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from struct import pack_into, unpack_from
from typing import NamedTuple

from iced_x86 import RflagsBits

from trivisor.translation.assembled import Piece, assembled
from trivisor.translation.layout import SITE_SIZE, TLB_ENTRIES

ARITHMETIC = 0x3F
"""The arithmetic flags, in iced's RflagsBits order: OF SF ZF AF CF PF."""


@lru_cache(maxsize=1 << 16)
def asm(source: str) -> bytes:
    """Assemble a fixed sequence; the state block's fields are symbols."""
    return assembled(source).code


PARK = asm("mov r11, rax\n lahf\n seto al\n mov [rsp+FLAGS_AX], ax\n mov rax, r11")
RESTORE = asm("mov r11, rax\n movzx eax, word [rsp+FLAGS_AX]\n add al, 0x7f\n sahf\n mov rax, r11")
PARK_CARRY = asm("setb byte [rsp+FLAGS_AX+1]")
RESTORE_CARRY = asm("movzx r11d, byte [rsp+FLAGS_AX+1]\n shr r11d, 1")
"""The same where nobody needs another flag than CF; either goes with either."""
CARRY = RflagsBits.CF
POLL = asm("mov r11, [rsp+POLL]\n mov r11d, [r11]")


ALIGNMENT = {2: 2, 4: 4, 8: 8, 10: 8}
"""By the size of an access, what #AC wants its address to be a multiple of (Intel SDM 3A table 6-7)."""

KIND_WRITE = 1
KIND_USER = 2
KIND_PARKED = 4
KIND_JUDGED = 0x200
"""The instruction may have a fault that comes before this access's: Python judges."""
KIND_CHUNK = 0x100
"""More than the size named is accessed, up to the end of the page."""

CHECK_TAIL = 8
"""Bytes from the end of a check's jump to the end of the check."""
_JUMP_SIZE, _COMPARE_SIZE = 6, 7
"""Bytes of a check's jump, and of the comparison before it, each of which ends in 32 bits."""


class Form(NamedTuple):
    """How a tuned instruction reaches memory (see `tuning.py`), where it is not by the TLB's plain check.

    Its check goes by a site cache first.  One check may serve several
    instructions: the first of such a group *leads*, with a check of the whole
    range, and the others find r10 as it has left it.
    """

    sites: tuple[int, ...] = ()
    """Number of the site cache of each check; none for a group's followers."""
    before: int = 0
    """Bytes from where the group's range begins, which is where r10 points, to this instruction's operand."""
    span: int = 0
    """Bytes of the group's range, for its leader."""
    write: bool = False
    """Whether the group writes."""
    distant: bool = False
    """r10 is the distance from linear to host addresses instead: operands keep their base, with r10 as their index.

    So an address need not wait for its check.  What fails one goes on in a plain block, be it a group or alone.
    """

    @property
    def leads(self) -> bool:
        return self.span > 0

    @property
    def follows(self) -> bool:
        return not self.sites


class Miss(NamedTuple):
    """A TLB check's way out: where its jump ends, where to try again, and the kind and size of the access.

    The kind's low bits are the `KIND_` constants; from bit 4 it has the check's number in the instruction.
    """

    jump_end: int
    retry: int
    kind_and_size: int
    crossing: bytes = b""
    """What follows the check, again, for a write across pages: it goes to a buffer first."""
    rejoin: int = 0
    """Where that goes on, if not at the instruction's end."""
    site: int = -1
    """The site cache that it went by, or -1."""
    leads: bool = False
    """The check is for a group: if it fails, its instructions go on one by one."""
    distant: bool = False
    """See `Form.distant`: r11, and not r10, has the linear address."""


class Fragment(NamedTuple):
    """Assembled text with its TLB checks and its escapes to Python (offsets of their descriptions)."""

    code: bytes
    misses: tuple[Miss, ...] = ()
    escapes: tuple[int, ...] = ()
    restart: bool = False
    """A later access that misses starts again after this."""
    checks: int = 0
    """Prepared ones included."""


def _segment_check(segment: str, kind: str, size: int, helper: str, number: int) -> str:
    """r10, an offset of 32 bits, held against the segment's window (`segmentation.py`) and made linear."""
    return f"""
        cmp r10, [rsp+{segment}_FIRST]
        jb outside_{number}
        lea r11, [r10+{size - 1}]
        cmp r11, [rsp+{segment}_LAST_{kind.upper()}]
        jle inside_{number}
        outside_{number}:
        call qword [rsp+{helper}]
        escape_{number}: dq 0
        dd 0
        inside_{number}:
        mov r11, [rsp+{segment}_BASE]
        lea r10d, [r10+r11]"""


_HELPER_OF_LINE = {"escape": "ESCAPE", "fault": "FAULT_{0}", "assist": "{0}"}

_TLB_INDEX = f"""
                mov r11d, r10d
                shr r11d, 7
                and r11d, {(TLB_ENTRIES - 1) * 32}"""


def site_fields(site: int, user: bool) -> tuple[str, str]:
    """The addresses of a site cache's tag and host page, as assembly has them."""
    at = f"rsp+{'SITES_USER' if user else 'SITES_KERNEL'}+{site * SITE_SIZE}"
    return at, at + "+8"


@lru_cache
def _refill(user: bool, write: bool, distant: bool) -> Piece:
    """`site_refill` of site 0; labels end where what depends on the site does: 32 bits each."""
    view = "TLB_USER" if user else "TLB_KERNEL"
    tag, host = site_fields(0, user)
    entry = f"rsp+r11+{view}+{'TLB_WRITE' if write else 'TLB_READ'}"
    return assembled(
        f"""
        {"mov r10, r11" if distant else ""}
        xor r10, [{tag}]
    tag_1:{_TLB_INDEX}
        xor r10, [{entry}]
        cmp r10, dword 4096
    room:
        db 0x0f, 0x87, 0, 0, 0, 0
    missed:
        add r10, [rsp+r11+{view}+TLB_HOST]
        inc dword [rsp+SITE_MISSES]
    count:
        mov r11, [{entry}]
        mov [{tag}], r11
    tag_2:
        mov r11, r10
        and r11, -4096
        {f"sub r11, [{tag}]" if distant else ""}
    tag_3:
        mov [{host}], r11
    host:
        db 0xe9, 0, 0, 0, 0
    back:
        """
    )


def site_refill(site: int, user: bool, write: bool, size: int, distant: bool) -> tuple[bytearray, int, int]:
    """What follows a site cache's miss, with r10 (or r11) = address xor tag: a look at the TLB, which fills it.

    Returns the code and where its jumps for a miss there too, and back, end: to after the check with the host
    address in r10, or to its last instruction if it is `distant`.
    """
    program = _refill(user, write, distant)
    code, labels = bytearray(program.code), program.labels
    for label in ("tag_1", "tag_2", "tag_3", "host") if distant else ("tag_1", "tag_2", "host"):
        _add(code, labels[label], site * SITE_SIZE)
    _add(code, labels["count"], site * 4)
    _add(code, labels["room"], -size)
    return code, labels["missed"], labels["back"]


def _add(code: bytearray, end: int, value: int) -> None:
    """Add to the 32 bits that end there."""
    pack_into("<I", code, end - 4, unpack_from("<I", code, end - 4)[0] + value)


def fragment(
    source: str, user: bool, first: int, prepared: int, form: Form | None = None, aligned: bool = False
) -> Fragment:
    """Assembled text, as `_assembled` has it, with the site caches and the span that the form tells."""
    if form is None:
        return _assembled(source, user, first, prepared, None, aligned)
    alike = form._replace(sites=tuple(min(site, 0) for site in form.sites), before=0, span=min(form.span, 1))
    made = _assembled(source, user, first, prepared, alike, aligned)
    code = bytearray(made.code)
    misses = []
    for miss in made.misses:
        end, kind, site = miss.jump_end, miss.kind_and_size, miss.site
        if miss.leads:
            kind += form.span - 1 << 16
            _add(code, end - _JUMP_SIZE, 1 - form.span)
        if site == 0:
            site = form.sites[min(kind >> 4 & 15, len(form.sites) - 1)]
            _add(code, end - _JUMP_SIZE - _COMPARE_SIZE, site * SITE_SIZE)
            _add(code, end + CHECK_TAIL, site * SITE_SIZE)
        crossing = bytes(code[end + CHECK_TAIL : miss.rejoin]) if miss.crossing else b""
        misses.append(miss._replace(kind_and_size=kind, site=site, crossing=crossing))
    return made._replace(code=bytes(code), misses=tuple(misses))


@lru_cache(maxsize=1 << 14)
def _assembled(source: str, user: bool, first: int, prepared: int, form: Form | None, aligned: bool) -> Fragment:
    """Assemble text in which these lines stand for more:

    `retry` - an access that misses starts again here;
    `check read|write SIZE [chunk] [judged]` - turn r10 from a linear into a host address, by way of the TLB;
    `escape` - have Python do the instruction instead;
    `assist HELPER` - have the helper at this field of the state block do it, which goes on here or escapes;
    `segment NAME read|write SIZE [escape]` - turn r10 from an offset in a segment into a linear address, or raise
    #GP or #SS (or have Python do the instruction);
    `fault gp|ss|de|ud|nm` - raise the exception, with error code 0 if it has one.

    Checks are numbered from `first`; see `Recipe.prepared`.
    """
    view = "TLB_USER" if user else "TLB_KERNEL"
    lines: list[str] = []
    kinds: list[tuple[int, int, int, int]] = []
    retries = escapes = checks = 0
    for line in source.splitlines():
        words = line.split()
        if words[:1] == ["retry"]:
            retries += 1
            lines.append(f"retry_{retries}:")
        elif words[:1] == ["check"]:
            number = first + checks
            checks += 1
            if prepared >> number & 1:
                lines.append(f"mov r10, [rsp+PREPARED_{number}]")
                continue
            if form is not None and form.follows:
                continue
            size, write = int(words[2]), words[1] == "write"
            leads = form is not None and form.leads
            if form is not None and leads:
                size, write = form.span, form.write
            kind = (KIND_WRITE if write else 0) | (KIND_USER if user else 0) | number << 4
            kind |= (KIND_CHUNK if "chunk" in words[3:] else 0) | (KIND_JUDGED if "judged" in words[3:] else 0)
            tag = f"rsp+r11+{view}+{'TLB_WRITE' if write else 'TLB_READ'}"
            host = f"rsp+r11+{view}+TLB_HOST"
            index = _TLB_INDEX
            site = -1
            if form is not None and "chunk" not in words[3:]:
                site = form.sites[min(number, len(form.sites) - 1)]
            checked, last = "r10", "add"
            if site >= 0:
                tag, host = site_fields(site, user)
                index = ""
                if form is not None and form.distant:
                    checked, last = "r11", "mov"
            kinds.append((kind, size, retries, site))
            if aligned and size in ALIGNMENT:
                # An odd address is made one that no TLB knows; Python sees what it was.
                passed = f"aligned_{len(kinds) - 1}"
                lines.append(f"test r10d, {ALIGNMENT[size] - 1}\n jz {passed}\n btc r10, 62\n {passed}:")
            lines.append(
                f"""{index}
                xor {checked}, [{tag}]
                cmp {checked}, dword {4096 - size}
                db 0x0f, 0x87, 0, 0, 0, 0
                check_{len(kinds) - 1}:
                {last} r10, [{host}]"""
            )
        elif words[:1] == ["stored"]:
            if kinds:
                lines.append(f"stored_{len(kinds) - 1}:")
        elif words[:1] == ["segment"]:
            helper = "ESCAPE" if words[4:] else "FAULT_SS" if words[1] == "SS" else "FAULT_GP"
            lines.append(_segment_check(words[1], words[2], int(words[3]), helper, escapes))
            escapes += 1
        elif words[:1] in (["escape"], ["fault"], ["assist"]):
            helper = _HELPER_OF_LINE[words[0]].format(*(word.upper() for word in words[1:]))
            lines.append(f"call qword [rsp+{helper}]")
            if words[0] == "assist":
                lines.append(f"jmp assisted_{escapes}")
            lines.append(f"escape_{escapes}: dq 0\n dd 0\n assisted_{escapes}:")
            escapes += 1
        else:
            lines.append(line)
    program = assembled("\n".join(lines))
    labels = program.labels
    return Fragment(
        program.code,
        tuple(
            Miss(
                labels[f"check_{i}"],
                labels[f"retry_{retry}"] if retry else 0,
                kind | size << 16,
                program.code[labels[f"check_{i}"] + CHECK_TAIL : labels.get(f"stored_{i}", 0)],
                labels.get(f"stored_{i}", 0),
                site=site,
                leads=form is not None and form.leads,
                distant=form is not None and form.distant,
            )
            for i, (kind, size, retry, site) in enumerate(kinds)
        ),
        tuple(labels[f"escape_{i}"] for i in range(escapes)),
        retries > (kinds[-1][2] if kinds else 0),
        checks,
    )


def forget_assembled() -> None:
    """Give back the memory of sequences that were assembled."""
    asm.cache_clear()
    _assembled.cache_clear()


class Variant(NamedTuple):
    """A recipe as bytes, for one way of meeting the flags."""

    code: bytes
    misses: tuple[Miss, ...]
    absolutes: tuple[tuple[int, int, int | None], ...]
    """(offset, width, distance): an immediate that becomes the next instruction's address + distance, or
    + `Constants.relative` for None."""
    patches: tuple[tuple[int, int, int], ...]
    """(offset, width, which): bytes that are those of the instruction's constant number `which`."""
    parked: bool
    """Whether the flags are parked afterwards."""
    fault_parked: bool
    """Whether they are parked where the host may fault."""
    fields: tuple[tuple[int, int, int], ...] = ()
    """See `Item.fields`."""


class Constants(NamedTuple):
    """What sets apart instructions that share a recipe."""

    displacement: bytes = b""
    immediate: bytes = b""
    relative: int = 0
    """Distance from the next instruction to the branch's target or the rip-relative operand."""
    places: tuple[int, int] = (0, 0)
    """Where in the instruction displacement and immediate stand."""
    has_address: bool = False
    """One of them may be an address that a loader has relocated: see `may_be_address`."""


def may_be_address(constant: bytes) -> bool:
    """Whether it may be an address in the top 2 GiB, where kernels put themselves, in 4 or 8 bytes.

    So near the top are masks and small negative numbers instead.
    """
    return len(constant) >= 4 and 0x80 <= constant[3] < 0xFF and constant[4:] in (b"", b"\xff\xff\xff\xff")


Entry = tuple["Recipe", Constants, bytes | None]
"""An instruction: its recipe, its constants and, where neither address nor flags matter, its finished code."""

DISPLACEMENT, IMMEDIATE = 0, 1
"""Which of `Constants` a patch takes."""


class Item(NamedTuple):
    """A step of a recipe."""

    is_op: bool
    code: bytes
    misses: tuple[Miss, ...] = ()
    escapes: tuple[int, ...] = ()
    restart: bool = False
    loops: bool = False
    width: int = 0
    """Of an immediate at the end that is relative to the next instruction."""
    displacement: int | None = 0
    patch: tuple[int, int, int] | None = None
    fields: tuple[tuple[int, int, int], ...] = ()
    """What depends on the instruction's registers: (offset, kind, distance to a second place); see `families.py`."""


@dataclass(slots=True)
class Recipe:
    """The steps of one instruction.

    Code leaves flags alone, a clobber destroys them, and an op is the
    instruction's own effect: it alone reads or writes the guest's flags.
    """

    user: bool
    near: bool
    """Addresses of this code fit a sign-extended 32-bit immediate."""
    prepared: int = 0
    """A bit for each check, by number, whose access Python has prepared: it takes its host address from there."""
    single: bool = False
    """Of a repeated string instruction do one element only."""
    form: Form | None = None
    """How it reaches memory, if not by the TLB alone."""
    aligned: bool = False
    """Its accesses raise #AC where they are not aligned."""
    reads: int = 0
    """Flags (iced's bits) that the op needs."""
    writes: int = 0
    """Flags that the op surely overwrites."""
    items: list[Item] = field(default_factory=list)
    clobbers: bool = False
    length: int = 0
    """Bytes of the guest instruction."""
    ends: object | None = None
    """How the block ends, when this instruction ends it (one of `modes`' terminators)."""
    shadow: bool = False
    """Interrupts are held off until the next instruction is done; then the block must look for them."""
    polls: bool = False
    """Interrupts may have become possible: look for them right after this instruction."""
    shared: bool = False
    """Instructions that differ only in their constants may use it: every constant is patched in."""
    segment: str = ""
    """r10 is an offset in this segment, which the next check turns into a linear address first."""
    simple: Variant | None = None
    """The bytes for flags that are not parked, where it does not matter who needs them."""
    _variants: dict[tuple[bool, int, bool], Variant] = field(default_factory=dict)
    checks: int = 0
    """TLB checks, prepared ones included."""
    takes_form: bool = False
    """It may share its one check with others: its operand is [r10] and it leaves r10 alone."""

    def code(self, source: str) -> None:
        """Add assembly that leaves the flags alone."""
        self.items.append(Item(False, asm(source)))

    def raw(self, code: bytes, patch: tuple[int, int, int] | None = None) -> None:
        """Add bytes that leave the flags alone."""
        self.items.append(Item(False, code, patch=patch))

    def clobber(self, source: str, *, loops: bool = False) -> None:
        """Add assembly that destroys the host's flags; `fragment`'s pseudo-instructions may be used.

        `loops`: it jumps around its checks.
        """
        made = fragment(source, self.user, self.checks, self.prepared, self.form, self.aligned)
        self.checks += made.checks
        self.items.append(Item(False, made.code, made.misses, made.escapes, made.restart, loops))
        self.clobbers = True

    def op(self, code: bytes, patch: tuple[int, int, int] | None = None) -> None:
        """Add the instruction itself."""
        self.items.append(Item(True, code, patch=patch))

    def check(self, size: int, *, write: bool, judged: bool = False) -> None:
        """Turn r10 from a linear into a host address for an access of `size` bytes.

        A miss starts again at the first item since the last op or check.  `judged`: see `KIND_JUDGED`.
        """
        if self.form is not None and self.form.follows:
            return
        access = f"{'write' if write else 'read'} {size}"
        check = f"check {access}" + (" judged" if judged else "")
        self.clobber((f"segment {self.segment} {access}\n" if self.segment else "") + check)
        self.segment = ""

    @property
    def before(self) -> int:
        """What to add to r10 after a check for the operand's host address."""
        return self.form.before if self.form is not None else 0

    @property
    def addressed(self) -> bool:
        """Whether r10 has the host address, or its distance, already."""
        return self.form is not None and self.form.follows

    @property
    def distant(self) -> bool:
        """See `Form.distant`."""
        return self.form is not None and self.form.distant

    def absolute(self, register: str, displacement: int | None) -> None:
        """Load r10 or r11 with the next instruction's address plus `displacement`; None: the constant's."""
        number = int(register[1:]) - 8
        if self.near:
            code, width = bytes((0x49, 0xC7, 0xC0 + number, 0, 0, 0, 0)), 4
        else:
            code, width = bytes((0x49, 0xB8 + number)) + bytes(8), 8
        self.items.append(Item(False, code, width=width, displacement=displacement))

    def finish(self) -> None:
        """Nothing more is added."""
        if not self.clobbers:
            self.simple = self.variant(False, 0)

    def entry(self, constants: Constants) -> Entry:
        """The instruction with these constants."""
        simple = self.simple
        if simple is None or simple.absolutes:
            return self, constants, None
        code = bytearray(simple.code)
        for offset, width, which in simple.patches:
            code[offset : offset + width] = constants.immediate if which == IMMEDIATE else constants.displacement
        return self, constants, bytes(code)

    def variant(self, parked: bool, live: int, *, carry_alone: bool = False) -> Variant:
        """The bytes when flags are parked (or not) on entry and `live` flags are needed afterwards.

        With `carry_alone`, CF is parked and restored alone where that is enough.
        """
        needed = self.reads | (live & ~self.writes)
        if not needed:
            way = DEAD
        elif self.reads | self.writes:
            way = WANTED
        else:
            way = KEPT if self.clobbers else UNTOUCHED
        return self.variant_for(parked, way, carry_alone and needed == CARRY)

    def variant_for(self, parked: bool, way: int, carry_alone: bool = False) -> Variant:
        """The same by the way in which it meets the flags: `DEAD` and its like."""
        key = (parked, way, carry_alone)
        found = self._variants.get(key)
        if found is None:
            found = self._variants[key] = self._build(parked, way, carry_alone)
        return found

    def fix_immediate(self) -> None:
        """Its immediate is no constant that may be another's."""
        self.items = [
            item._replace(patch=None) if item.patch is not None and item.patch[2] == IMMEDIATE else item
            for item in self.items
        ]
        self._variants.clear()
        self.finish()

    def set_fields(self, fields: dict[int, tuple[tuple[int, int, int], ...]]) -> None:
        """Note in which of its items register numbers stand; see `Item.fields`."""
        self.items = [item._replace(fields=fields.get(number, ())) for number, item in enumerate(self.items)]
        self._variants.clear()
        self.finish()

    def _build(self, parked: bool, way: int, carry_alone: bool) -> Variant:
        park, restore = (PARK_CARRY, RESTORE_CARRY) if carry_alone else (PARK, RESTORE)
        out = bytearray()
        misses: list[Miss] = []
        absolutes: list[tuple[int, int, int | None]] = []
        patches: list[tuple[int, int, int]] = []
        fields: list[tuple[int, int, int]] = []
        if way in (KEPT, WANTED) and self.clobbers and not parked:
            out += park
            parked = True
        elif way == DEAD:
            parked = False
        kind = KIND_PARKED if parked else 0
        loops = False
        again = len(out)
        for item in self.items:
            if item.is_op and parked and way == WANTED:
                out += restore
                parked = False
            at = len(out)
            out += item.code
            for miss in item.misses:
                retry = at + miss.retry if miss.retry else again
                misses.append(
                    miss._replace(
                        jump_end=at + miss.jump_end,
                        retry=retry,
                        kind_and_size=miss.kind_and_size | kind,
                        rejoin=at + miss.rejoin if miss.rejoin else 0,
                    )
                )
            for escape in item.escapes:
                out[at + escape + 8 : at + escape + 12] = kind.to_bytes(4, "little")
                absolutes.append((at + escape, 8, -self.length))
            loops = loops or item.loops
            if item.patch is not None:
                patches.append((at + item.patch[0], item.patch[1], item.patch[2]))
            fields.extend((at + offset, kind, distance) for offset, kind, distance in item.fields)
            if item.width:
                absolutes.append((len(out) - item.width, item.width, item.displacement))
            if item.is_op or item.misses or item.restart:
                again = len(out)
        fault_parked = parked
        if parked and way == WANTED:
            out += restore
            parked = False
        if misses and misses[-1].kind_and_size & KIND_WRITE and not loops and not misses[-1].leads:
            last = misses[-1]
            tail = last.jump_end + CHECK_TAIL
            if not any(offset > tail for offset, _, _ in absolutes):
                misses[-1] = last._replace(crossing=bytes(out[tail:]))
        return Variant(bytes(out), tuple(misses), tuple(absolutes), tuple(patches), parked, fault_parked, tuple(fields))


# How a recipe meets the flags: nobody needs them; somebody does, later; the op does; nothing touches them.
DEAD, KEPT, WANTED, UNTOUCHED = range(4)
