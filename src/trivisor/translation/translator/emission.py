"""Laying out one block: entries, code, the end, and what stands out of line."""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct, pack, pack_into

from trivisor.translation.layout import EXITS, OFFSETS
from trivisor.translation.modes import (
    Branch,
    Breakpoint,
    CallOut,
    Indirect,
    Jump,
    Missing,
    Mode,
    Native,
    Raise,
    Repeat,
    RepeatCompare,
)
from trivisor.translation.translator.block import ADDRESS_32, ADDRESS_64, JUMP_SLOT, TO_HELPER, Link, Translation
from trivisor.translation.translator.recipe import (
    ARITHMETIC,
    CHECK_TAIL,
    KIND_PARKED,
    KIND_WRITE,
    PARK,
    POLL,
    RESTORE,
    Constants,
    Entry,
    Miss,
    Recipe,
    asm,
    may_be_address,
    site_refill,
)
from trivisor.x86.exceptions import GENERAL_PROTECTION

_MASK64 = (1 << 64) - 1
_LONGEST = 15  # bytes of an instruction

CALL_MISS = asm("call qword [rsp+MISS]")
_CALL_MISS = int.from_bytes(CALL_MISS, "little")
assert _CALL_MISS >> 24, "the call is four bytes long"
_DESCRIPTION = Struct("<IIIQII").pack
CALL_CROSSED = asm("call qword [rsp+CROSSED]")
CALL_CHAIN = asm("call qword [rsp+CHAIN]")
CALL_OUT = asm("call qword [rsp+CALL_OUT]")
CALL_RAISE = asm("call qword [rsp+RAISE]")
_LEAVE = asm("jmp qword [rsp+LEAVE]")
JUMP_INDEXED = {
    name: asm(f"movzx r11d, r10w\n jmp qword [rsp+r11*8+JUMP_CACHE_{name}]") for name in ("KERNEL", "USER", "OTHER")
}
NOTE_JUMP = b"\x4c\x8d\x1d\xf9\xff\xff\xff" + asm("mov [rsp+JUMPED_FROM], r11")  # lea r11, [rip-7]: this place
_STORE_RIP_R10 = asm("mov [rsp+GUEST_RIP], r10")


def _set_exit(name: str) -> bytes:
    return asm(f"mov qword [rsp+EXIT], {EXITS[name]}")


_STEPPED = _STORE_RIP_R10 + _set_exit("EXIT_STEPPED") + _LEAVE


class Emission:
    """The making of one block; `base` is where in the code cache its code will stand.

    Whatever depends on where the block stands, on the host or in the guest, goes into `relocations`.
    """

    __slots__ = (
        "base", "block", "exits", "links", "locations", "lookup", "misses", "mode", "near", "out", "relocations",
        "single",
    )  # fmt: skip

    def __init__(self, mode: Mode, near: bool, block: Translation, base: int, lookup: int, single: bool) -> None:
        self.mode = mode
        self.near = near
        """Guest addresses fit sign-extended 32-bit immediates."""
        self.block = block
        self.base = base
        self.lookup = lookup
        self.single = single
        """The block is one instruction that leaves to Python when it is done."""
        self.out = block.code
        self.relocations = block.relocations
        self.misses: list[tuple[int, int, Miss, int, bool]] = []
        """(start and end of the instruction's code, the check, guest rip, flags parked where it may fault)."""
        self.exits: list[tuple[int, int, int]] = []
        """(end of a conditional jump out of a trace and out of the page, its target, guest rip)."""
        self.locations = block.locations
        self.links = block.links

    def emit(self, chosen: list[Entry], poll_at_end: bool, turns: Mapping[int, int], tuned: bool) -> None:
        """Emit everything.

        `turns` has the jumps that a trace goes past: by index, the linear address where it goes on.
        """
        # Liveness, backwards: what comes after the block is not known, so all flags are live there.
        live = ARITHMETIC
        lives = []
        for index in range(len(chosen) - 1, -1, -1):
            recipe = chosen[index][0]
            if index in turns and isinstance(recipe.ends, Branch):
                live = ARITHMETIC
            lives.append(live)
            live = recipe.reads | (live & ~recipe.writes)
        lives.reverse()
        block, out = self.block, self.out
        rip = at = block.rip
        parked = block.parks_first = tuned and bool(live) and self._parks_first(chosen, lives)
        if parked:
            self._prologue_that_parks()
        elif not self.single:
            self._prologue()
            if live:
                out += RESTORE
            block.polled = len(out)
            out += POLL
            block.body = len(out)
        body = block.body
        locations = self.locations
        for index, ((recipe, constants, finished), needed) in enumerate(zip(chosen, lives, strict=True)):
            start = len(out)
            if finished is not None and not (parked and recipe.reads | recipe.writes):
                locations.append((start - body) | parked << 21 | (at - rip) << 22)
                out += finished
                if constants.has_address and recipe.shared:
                    assert recipe.simple is not None
                    self._note_constants(start, at, recipe.simple.patches, constants)
                at += recipe.length
                if index in turns:
                    at = self._turn(recipe, constants, at, turns[index])
                continue
            code, misses, absolutes, patches, parked, fault_parked, _ = recipe.variant(
                parked, needed, carry_alone=tuned
            )
            locations.append((start - body) | fault_parked << 21 | (at - rip) << 22)
            out += code
            for offset, width, which in patches:
                out[start + offset : start + offset + width] = constants[which]  # type: ignore[assignment]
            if constants.has_address and recipe.shared:
                self._note_constants(start, at, patches, constants)
            if misses:
                end = len(out)
                for miss in misses:
                    self.misses.append((start, end, miss, at, fault_parked))
            at += recipe.length
            if absolutes:
                self._patch_absolutes(start, absolutes, at, constants.relative)
            if index in turns:
                at = self._turn(recipe, constants, at, turns[index])
        if poll_at_end:
            self._in_host(parked)
            parked = False
            locations.append((len(out) - body) | (at - rip) << 22)
            out += POLL
        self._ending(*chosen[-1][:2], at, parked)
        self._out_of_line(body)

    def _note_constants(
        self, start: int, rip: int, patches: tuple[tuple[int, int, int], ...], constants: Constants
    ) -> None:
        """Note where a shared recipe's code has constants that may be addresses: it is as good for others."""
        for offset, width, which in patches:
            if may_be_address(constants[which]):  # type: ignore[arg-type]
                self.block.constants.append((start + offset, rip - self.block.rip + constants.places[which], width))

    def _parks_first(self, chosen: list[Entry], lives: list[int]) -> bool:
        """Whether the first thing that concerns the flags, which are live, is that they are parked."""
        for (recipe, _, _), live in zip(chosen, lives, strict=True):
            if recipe.clobbers or recipe.reads | recipe.writes:
                return recipe.clobbers and bool(recipe.reads | (live & ~recipe.writes))
        recipe, constants, _ = chosen[-1]
        if isinstance(recipe.ends, Jump):
            after = self.block.rip + self.block.length
            return not self._is_linkable(after + constants.relative & _MASK64, after - recipe.length)
        return isinstance(recipe.ends, Indirect)

    def _prologue_that_parks(self) -> None:
        """The entries of a block that would have to park flags at once: who comes with parked ones goes past that."""
        block, out = self.block, self.out
        self._prologue()
        out += b"\xeb" + bytes((len(PARK),))  # jmp past PARK
        block.polled = block.body = len(out)
        out += PARK
        self.locations.append(len(PARK) | 1 << 21)
        out += POLL

    def _prologue(self) -> None:
        """The checked entry: on with the block if r10 is its address, else to the look-up.

        Flags are parked on the way here, so the comparison may destroy the host's: if r10 is another block's
        address, that block finds them where they are.
        """
        out, rip = self.out, self.block.rip
        if self.near:
            self.relocations.append(3 | ADDRESS_32)
            out += b"\x49\x81\xfa" + pack("<I", rip & 0xFFFFFFFF)  # cmp r10, rip
        else:
            self.relocations.append(2 | ADDRESS_64)
            out += b"\x49\xbb" + pack("<Q", rip) + b"\x4d\x39\xda"  # mov r11, rip; cmp r10, r11
        self.relocations.append(len(out) + 2 | TO_HELPER)
        out += b"\x0f\x85" + pack("<i", self.lookup - (self.base + len(out) + 6))
        self.block.parked = len(out)

    def _in_host(self, parked: bool) -> None:
        """Have the flags in the host's."""
        if parked:
            self.out += RESTORE

    def _in_park(self, parked: bool) -> None:
        """Have the flags parked, as every way through a jump cache wants them."""
        if not parked:
            self.out += PARK

    def _turn(self, recipe: Recipe, constants: Constants, after: int, way: int) -> int:
        """Go past a jump of a trace, on the way given; the other one of a conditional jump leads out."""
        ends = recipe.ends
        if isinstance(ends, Branch):
            here, taken = after - recipe.length, after + constants.relative & _MASK64
            other, condition = (taken, ends.condition) if way == after else (after, ends.condition ^ 1)
            self.out += bytes((0x0F, 0x80 | condition))
            if self._is_linkable(other, here):
                self._link(other, here, parked=False)
            else:
                self.out += bytes(4)
                self.exits.append((len(self.out), other, here))
        return way

    def _ending(self, last: Recipe, constants: Constants, next_rip: int, parked: bool) -> None:
        out = self.out
        ends = last.ends
        here = next_rip - last.length
        after = next_rip & self.mode.linear_mask
        if ends is None:
            self._go(after, here, parked)
        elif isinstance(ends, Jump):
            self._go(self._target(after, constants.relative, ends.narrow), here, parked)
        elif isinstance(ends, Branch):
            self._branch(ends, after, self._target(after, constants.relative, ends.narrow), here, parked)
        elif isinstance(ends, Indirect) and not self.single:
            self._in_park(parked)
            if self.mode.bits == 64:
                out += NOTE_JUMP
            out += JUMP_INDEXED[self.mode.jump_cache_name]
        else:
            self._in_host(parked)
            self._leaving(ends, last, here, after)

    def _target(self, after: int, relative: int, narrow: bool) -> int | None:
        """Linear address of a direct jump's target; None for one beyond the code segment's limit."""
        mode = self.mode
        if mode.bits == 64:
            return after + relative & _MASK64
        offset = after - mode.code_base + relative & (0xFFFF if narrow else 0xFFFFFFFF)
        return mode.code_base + offset & 0xFFFFFFFF if offset <= mode.code_limit else None

    def _leaving(self, ends: object, last: Recipe, here: int, after: int) -> None:
        """The ends that lead out of translated code."""
        out = self.out
        if isinstance(ends, Indirect):
            out += _STEPPED
        elif isinstance(ends, CallOut):
            out += CALL_OUT
            self._address_64(here)
        elif isinstance(ends, Native):
            out += b"\xff\x94\x24" + pack("<I", OFFSETS[ends.name])
            self._address_64(here)
            out += pack("<I", last.length)
        elif isinstance(ends, Raise):
            self._raise(ends, here)
        elif isinstance(ends, Breakpoint):
            self._rip_into_r10(here)
            out += _STORE_RIP_R10 + _set_exit("EXIT_BREAKPOINT") + _LEAVE
        elif isinstance(ends, Missing):
            self._rip_into_r10(here)
            out += _STORE_RIP_R10 + _set_exit("EXIT_UNDEFINED") + _LEAVE
        elif isinstance(ends, (Repeat, RepeatCompare)):
            self._repeat(ends, here, after)
        else:
            raise TypeError(ends)

    def _repeat(self, ends: Repeat | RepeatCompare, here: int, after: int) -> None:
        """On at the same instruction, or at the next; a count of 16 bits stands alone in rcx for the test."""
        narrow = ends.bits == 16
        back = asm("mov rcx, r11") if narrow else b""
        again = back + _rip_into_r10(here) + _STEPPED
        compare = b""
        if isinstance(ends, RepeatCompare):
            compare = bytes((0x74 if ends.until_equal else 0x75, len(again)))
        self.out += asm("mov r11, rcx\n movzx ecx, cx") if narrow else b""
        self.out += b"\x67" if ends.bits == 32 else b""
        self.out += b"\xe3" + bytes((len(compare) + len(again),))  # jrcxz
        self.out += compare + again + back + _rip_into_r10(after) + _STEPPED

    def _raise(self, ends: Raise, here: int) -> None:
        self.out += CALL_RAISE
        self._address_64(here)
        self.out += pack("<Ii", ends.vector, ends.error)

    def _branch(self, ends: Branch, after: int, target: int | None, here: int, parked: bool) -> None:
        out = self.out
        if ends.prelude:
            out += ends.prelude
            jump = len(out)
            self._go(after, here, parked)
            out[jump - 1] = len(out) - jump
        else:
            out += bytes((0x0F, 0x80 | ends.condition))
            if target is not None and self._is_linkable(target, here):
                self._link(target, here, parked)
                self._go(after, here, parked)
                return
            out += bytes(4)
            jump = len(out)
            self._go(after, here, parked)
            pack_into("<i", out, jump - 4, len(out) - jump)
        if target is None:
            out += ends.undo
        self._go(target, here, parked)

    def _is_linkable(self, target: int, here: int) -> bool:
        """Direct jumps stay within a page, where no change of mappings can come between.

        So what may run into the next page is no target: its second page may be another by then.
        """
        if self.single or self.block.crosses:
            return False
        return target >> 12 == here >> 12 and target & 0xFFF <= 0x1000 - _LONGEST

    def _go(self, target: int | None, here: int, parked: bool) -> None:
        """Continue at `target`, from the instruction at `here`; None: that raises #GP."""
        if target is None:
            self._in_host(parked)
            self._raise(Raise(GENERAL_PROTECTION, 0), here)
        elif self.single:
            self._in_host(parked)
            self.out += _rip_into_r10(target) + _STEPPED
        elif self._is_linkable(target, here):
            self.out += b"\xe9"
            self._link(target, here, parked)
        else:
            # Another page: by way of the jump cache, which is emptied when mappings change.
            self._in_park(parked)
            slot = OFFSETS[f"JUMP_CACHE_{self.mode.jump_cache_name}"] + 8 * (target & 0xFFFF)
            self._rip_into_r10(target)
            self.relocations.append(len(self.out) + 3 | JUMP_SLOT)
            self.out += b"\xff\xa4\x24" + pack("<I", slot)

    def _link(self, target: int, here: int, parked: bool) -> None:
        """Append a jump's displacement, to be filled in."""
        self.links.append(Link(len(self.out), target, target <= here, parked))
        self.out += bytes(4)

    def _address_64(self, rip: int) -> None:
        """Append a guest address of 64 bits."""
        self.relocations.append(len(self.out) | ADDRESS_64)
        self.out += pack("<Q", rip & _MASK64)

    def _rip_into_r10(self, rip: int) -> None:
        """Append the loading of a guest address."""
        code = _rip_into_r10(rip)
        self.relocations.append(len(self.out) + (3 | ADDRESS_32 if len(code) == 7 else 2 | ADDRESS_64))
        self.out += code

    def _patch_absolutes(
        self, start: int, absolutes: tuple[tuple[int, int, int | None], ...], next_rip: int, relative: int
    ) -> None:
        """Put addresses into an instruction's code, which begins at `start`; raises FarTarget."""
        for offset, width, distance in absolutes:
            value = next_rip + (relative if distance is None else distance) & _MASK64
            offset += start
            if width == 4:
                if 0x80000000 <= value < 0xFFFFFFFF80000000:
                    raise FarTarget
                self.relocations.append(offset | ADDRESS_32)
                pack_into("<I", self.out, offset, value & 0xFFFFFFFF)
            else:
                self.relocations.append(offset | ADDRESS_64)
                pack_into("<Q", self.out, offset, value)

    def _link_plain(self, site: int, rip: int, kind: int) -> None:
        """The jump at `site` leaves a group whose check has failed, for a block that does its instructions singly."""
        self.links.append(Link(site, rip, False, bool(kind & KIND_PARKED), plain=True))

    def _out_of_line(self, body: int) -> None:
        """The ways out of TLB checks, and the jumps to code that is not there yet."""
        out = self.out
        for start, end, miss, rip, parked in self.misses:
            jump_end, retry, kind, crossing, rejoin, site, leads, distant = miss
            jump = start + jump_end
            pack_into("<I", out, jump - 4, len(out) - jump)
            if leads and site < 0:
                self._link_plain(jump - 4, rip, kind)
                continue
            if site >= 0:
                write, size = bool(kind & KIND_WRITE), kind >> 16
                code, missed, back = site_refill(site, self.mode.user_view, write, size, distant)
                at = len(out)
                out += code
                pack_into("<i", out, at + back - 4, jump + (0 if distant else CHECK_TAIL) - (at + back))
                if leads:
                    self._link_plain(at + missed - 4, rip, kind)
                    continue
                pack_into("<i", out, at + missed - 4, len(out) - (at + missed))
            described = len(out) + 4
            resume = described - (start + jump_end + CHECK_TAIL)
            self.relocations.append(described + 8 | ADDRESS_64)
            out += _DESCRIPTION(
                _CALL_MISS, described - start - retry, kind, rip & _MASK64, resume, 24 if crossing else 0
            )
            if crossing:
                self.locations.append((len(out) - body) | parked << 21 | (rip - self.block.rip) << 22)
                tail = start + jump_end + CHECK_TAIL
                self.block.copy_constants(tail, tail + len(crossing), len(out) - tail)
                out += out[tail : tail + len(crossing)] + CALL_CROSSED
                out += b"\xe9" + pack("<i", (start + rejoin if rejoin else end) - (len(out) + 5))
        for jump_end, target, here in self.exits:
            pack_into("<i", out, jump_end - 4, len(out) - jump_end)
            self._go(target, here, parked=False)
        for link in self.links:
            link.stub = len(out)
            pack_into("<i", out, link.site, link.stub - link.site - 4)
            self._in_host(link.parked)
            out += CALL_CHAIN
            link.number = len(out)
            out += bytes(4)


def _rip_into_r10(rip: int) -> bytes:
    rip &= _MASK64
    signed = rip - (1 << 64) if rip >> 63 else rip
    if -(1 << 31) <= signed < 1 << 31:
        return b"\x49\xc7\xc2" + pack("<i", signed)
    return b"\x49\xba" + pack("<Q", rip)


class FarTarget(Exception):
    """An address that does not fit where the block has put 32 bits for it."""
