"""What the native composer knows: the recipes of instructions, where machine code can find them.

A **shape** is an instruction without its constants: its bytes with displacement
and immediate blanked out.  It may stand for its whole family (`families.py`),
and an instruction whose code takes up its constants otherwise than by a patch is
a shape of its own.  A block of nothing but known shapes is put together by
`natives/compose.py`, without Python, byte for byte as `translator/emission.py`
would have done it.  What it does not know of a block, a shape or a variant of
one, it asks for (`WANTS_SHAPE`, `WANTS_VARIANT`).

The tables are one piece of memory that only grows: list heads, the composer's
scratch space, its tables for finding out where an instruction ends, fixed
sequences, and then records of shapes and variants.  When it is full nothing
more is told, and Python translates what is not known.
"""

from __future__ import annotations

import ctypes
import mmap
from struct import Struct, pack_into

from trivisor.machine.memory import host_map, host_unmap
from trivisor.translation import families
from trivisor.translation import instruction_lengths as lengths
from trivisor.translation.core import Core
from trivisor.translation.layout import OFFSETS
from trivisor.translation.modes import SEGMENTED_KEYS, Branch, CallOut, Indirect, Jump, Mode, Native, Raise
from trivisor.translation.translator import emission
from trivisor.translation.translator.recipe import (
    DEAD,
    IMMEDIATE,
    KEPT,
    PARK,
    POLL,
    RESTORE,
    UNTOUCHED,
    WANTED,
    Constants,
    Recipe,
    Variant,
)

_SHAPES = OFFSETS["SHAPES"] // 8
SIZE = 32 << 20

WANTS_SHAPE = 1
WANTS_VARIANT = 8
"""Plus the variant's index: 4 if flags are parked, plus its way."""
HEADS = 1 << 16

HASH_LOW, HASH_HIGH = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
"""Odd multipliers that spread the two halves of a shape's sixteen bytes."""
_MASK64 = (1 << 64) - 1

MAXIMUM_CODE = 512  # bytes of a variant
MAXIMUM_MISSES = 8
MAXIMUM_INSTRUCTIONS = 64
"""In one block."""
MAXIMUM_BLOCK_CODE = 1 << 18
"""More than the image of any block that is composed."""

SHAPE = {
    "S_BYTES": 0,  # sixteen: the instruction's, zeros in place of constants and beyond its end
    "S_NEXT": 16,  # the next shape with the same hash
    "S_PLACES": 20,  # offset and size of the displacement, and of the immediate; a byte each
    "S_MODE": 24,  # mode key | NEAR
    "S_LENGTH": 26,
    "S_READS": 27,  # flags, as in recipe.py
    "S_WRITES": 28,
    "S_CLOBBERS": 29,
    "S_POLLS": 30,
    "S_ENDS": 31,  # how the block ends with it: an ENDS_ constant
    "S_KIND": 32,  # a KIND_ constant: what is blanked in the bytes
    "S_RELATIVE": 33,  # where the distance of a branch or a rip-relative operand is: a RELATIVE_ constant
    "S_VECTOR": 34,  # of an exception; the condition of a branch
    "S_ARGUMENT": 36,  # the exception's error code; the state block's field of a helper
    "S_DISTANCE": 40,  # the distance of an exact one
    "S_VARIANTS": 44,  # of (flags parked, way): 0 where not told
}
_SHAPE = Struct("<16sIIHBBBBBBBBBxiiIIIIIIII").pack
NEAR = 0x8000
KIND_SHAPE, KIND_EXACT, KIND_FAMILY = range(3)
"""Constants; nothing; register numbers too."""
ENDS_NOT, ENDS_JUMP, ENDS_BRANCH, ENDS_INDIRECT, ENDS_CALL_OUT, ENDS_NATIVE, ENDS_RAISE = range(7)
RELATIVE_DISPLACEMENT, RELATIVE_IMMEDIATE, RELATIVE_EXACT = range(3)

VARIANT = {
    "V_CODE": 0,  # bytes of code, which begins at V_BYTES and is padded to 8
    "V_STATE": 2,  # bit 0: flags are parked afterwards; bit 1: ... where the host may fault
    "V_ABSOLUTES": 3,  # how many: {offset, 2 bytes; width; 1 if relative; distance, 4 bytes}
    "V_PATCHES": 4,  # then: {offset, 2 bytes; width; which constant}
    "V_MISSES": 5,  # last those of 16 bytes, MISS
    "V_FIELDS": 6,  # after the patches, padded to 8 with them: {offset, 2 bytes; kind; distance}, see families.py
    "V_BYTES": 8,
}
_VARIANT = Struct("<HBBBBBx").pack
_ABSOLUTE = Struct("<HBBi").pack
_PATCH = _FIELD = Struct("<HBB").pack
MISS = {"M_JUMP_END": 0, "M_RETRY": 2, "M_KIND": 4, "M_CROSSING": 8, "M_REJOIN": 10}
_MISS = Struct("<HHIHHxxxx").pack
MISS_SIZE = 16

SEQUENCES = {
    "PARK": PARK,
    "RESTORE": RESTORE,
    "POLL_CODE": POLL,
    "JUMP_KERNEL": emission.NOTE_JUMP + emission.JUMP_INDEXED["KERNEL"],
    "JUMP_USER": emission.NOTE_JUMP + emission.JUMP_INDEXED["USER"],
    "CALL_MISS": emission.CALL_MISS,
    "CALL_CROSSED": emission.CALL_CROSSED,
    "CALL_CHAIN": emission.CALL_CHAIN,
    "CALL_CALL_OUT": emission.CALL_OUT,
    "CALL_RAISE": emission.CALL_RAISE,
}
SEQUENCE_SIZE = 32  # of which the last byte is the length

_AT: dict[str, int] = {}
_at = 4 * HEADS
for _name, _size in {
    "C_COUNT": 8,  # instructions of the block
    "C_POSITION": 8,  # guest bytes so far
    "C_ROOM": 8,  # to the end of the page
    "C_MODE": 8,  # mode key | NEAR
    "C_STATE": 8,  # 1 while the flags are parked
    "C_START": 8,  # offset in the code cache of the block's code
    "C_ENTRIES": 8,  # offsets in it of the entries, a byte each: parked, polled, body
    "C_BODY": 8,  # host address of the first instruction's code
    "C_AT": 8,  # ... of that of the instruction being done
    "C_HERE": 8,  # its guest bytes' offset in the block
    "C_LINK_END": 8,  # ends of the lists
    "C_MISS_END": 8,
    "C_CONSTANT_END": 8,
    "C_VARIANT": 8,  # host address of that of the instruction being done
    "C_LEFT": 8,  # instructions still to be done
    "C_KEY": 16,  # the instruction's bytes without its constants
    "C_FAMILY": 16,  # ... and without register numbers
    "C_FORM": 8,  # a form of families.py
    "C_WHERE": 8,  # as I_WHERE
    "C_SPECIAL": 8,  # families.SPECIAL
    "C_REX": 8,  # the family's
    "C_OPEN": 8,  # 1 if it leaves a register number open
    "C_INSTRUCTIONS": MAXIMUM_INSTRUCTIONS * 16,
    "C_RELOCATIONS": 4 * 8192,
    "C_LOCATIONS": 4 * 2048,
    "C_LINKS": 20 * 128,
    "C_MISSES": 16 * 1024,
    "C_CONSTANTS": 12 * 1024,
    "C_LENGTH_MASKS": 16 * 16,
    "C_ONE_BYTE": 256,
    "C_TWO_BYTES": 256,
    "C_ONE_BYTE_FORMS": 256,
    "C_TWO_BYTES_FORMS": 256,
    **{f"Q_{name}": SEQUENCE_SIZE for name in SEQUENCES},
}.items():
    _AT[_name] = _at
    _at += _size
_FIRST_RECORD = (_at + 63) & -64

# Of an instruction of the block, in C_INSTRUCTIONS (offsets of ModRM, and of REX + 1, in it); of a miss, in C_MISSES.
_LISTS = {
    "I_SHAPE": 0, "I_POSITION": 4, "I_WAY": 8, "I_WHERE": 12, "I_MODRM": 13, "I_REX": 14,
    "O_START": 0, "O_END": 4, "O_MISS": 8, "O_POSITION": 12, "O_PARKED": 14,
}  # fmt: skip

SHAPE_SYMBOLS: dict[str, int] = {
    **SHAPE, **VARIANT, **MISS, **_AT, **_LISTS,
    "MISS_SIZE": MISS_SIZE, "NEAR": NEAR, "MAXIMUM_BLOCK_CODE": MAXIMUM_BLOCK_CODE,
    "RELATIVE_DISPLACEMENT": RELATIVE_DISPLACEMENT, "RELATIVE_IMMEDIATE": RELATIVE_IMMEDIATE,
    "RELATIVE_EXACT": RELATIVE_EXACT,
    "ENDS_JUMP": ENDS_JUMP, "ENDS_BRANCH": ENDS_BRANCH, "ENDS_INDIRECT": ENDS_INDIRECT,
    "ENDS_CALL_OUT": ENDS_CALL_OUT, "ENDS_NATIVE": ENDS_NATIVE, "ENDS_RAISE": ENDS_RAISE,
    "WAY_DEAD": DEAD, "WAY_KEPT": KEPT, "WAY_WANTED": WANTED, "WAY_UNTOUCHED": UNTOUCHED,
    "KIND_EXACT": KIND_EXACT, "KIND_FAMILY": KIND_FAMILY, "WANTS_SHAPE": WANTS_SHAPE, "WANTS_VARIANT": WANTS_VARIANT,
    "FORM_REG": families.REG, "FORM_BYTE": families.BYTE, "FORM_COUNT": families.COUNT,
    "FIELD_ADDRESS": families.FIELD_ADDRESS, "FIELD_OPERAND": families.FIELD_OPERAND,
    "HASH_LOW": HASH_LOW, "HASH_HIGH": HASH_HIGH, "MAXIMUM_INSTRUCTIONS": MAXIMUM_INSTRUCTIONS,
    **{
        f"LENGTH_{name}": getattr(lengths, name)
        for name in (
            "MODRM", "IMMEDIATE_8", "IMMEDIATE_16", "IMMEDIATE_V", "TEST_GROUP", "NEAR_BRANCH", "PREFIX",
            "OPERAND_SIZE", "REX", "ESCAPE", "VEX_2", "VEX_3",
        )
    },
}  # fmt: skip
"""For the composer's assembly."""


class ShapeTables:
    """The tables of one processor."""

    def __init__(self, core: Core) -> None:
        self._address = host_map(SIZE, mmap.PROT_READ | mmap.PROT_WRITE)
        self._words = core.words
        self.composing = True
        self.bytes = memoryview((ctypes.c_ubyte * SIZE).from_address(self._address)).cast("B")
        self._heads = self.bytes[: 4 * HEADS].cast("I")
        self._used = _FIRST_RECORD
        self._recipes: dict[int, Recipe] = {}
        """By the offsets of their shapes' records."""
        self._told: set[tuple[int, bool, bytes]] = set()
        """Instructions, by mode and nearness, that were told of: to tell again would change nothing."""
        masks = b"".join((b"\xff" * length).ljust(16, b"\0") for length in range(16))
        self._put("C_LENGTH_MASKS", masks)
        self._put("C_ONE_BYTE", lengths.ONE_BYTE)
        self._put("C_TWO_BYTES", lengths.TWO_BYTES)
        self._put("C_ONE_BYTE_FORMS", families.ONE_BYTE)
        self._put("C_TWO_BYTES_FORMS", families.TWO_BYTES)
        self._put("C_SPECIAL", families.SPECIAL.to_bytes(8, "little"))
        for name, code in SEQUENCES.items():
            assert len(code) < SEQUENCE_SIZE
            self._put(f"Q_{name}", code.ljust(SEQUENCE_SIZE - 1, b"\0") + bytes((len(code),)))

    @property
    def composing(self) -> bool:
        """Whether blocks are composed."""
        return bool(self._words[_SHAPES])

    @composing.setter
    def composing(self, composing: bool) -> None:
        self._words[_SHAPES] = self._address if composing else 0

    def _put(self, name: str, data: bytes) -> None:
        self.bytes[_AT[name] : _AT[name] + len(data)] = data

    def clear(self) -> None:
        """Forget all shapes; recipes that were told must not be used any more."""
        self._heads[:] = memoryview(bytes(4 * HEADS)).cast("I")
        self._used = _FIRST_RECORD
        self._recipes.clear()
        self._told.clear()

    def tell(self, mode: Mode, near: bool, recipe: Recipe, constants: Constants, raw: bytes) -> bool:
        """Make the shape of an instruction known; whether there is anything new."""
        if (mode.key, near, raw) in self._told:
            return False
        self._told.add((mode.key, near, raw))
        shape = self._add(mode, near, recipe, constants, raw)
        if not shape:
            return False
        self._recipes[shape] = recipe
        if recipe.simple is not None:
            self._add_simple(shape, recipe, recipe.simple)
        return True

    def add_variant(self, shape: int, index: int) -> bool:
        """Make a variant of a shape known, as `WANTS_VARIANT` has it; whether it could be."""
        parked, way = bool(index >> 2), index & 3
        variant = self._recipes[shape].variant_for(parked, way)
        at = self._add_variant(variant, variant.parked, variant.fault_parked)
        for place in ((False, DEAD), (True, DEAD)) if way == DEAD else ((parked, way),):
            self._set_variant(shape, *place, at)
        return at > 0

    def _add(self, mode: Mode, near: bool, recipe: Recipe, constants: Constants, raw: bytes) -> int:
        """The offset of a new shape's record; 0 if it cannot be had."""
        ends = self._ends(recipe)
        if (
            ends is None or recipe.shadow or recipe.prepared or recipe.single or recipe.form is not None
            or mode.bits != 64 or mode.key & SEGMENTED_KEYS or mode.debug or self._used + 64 * 1024 > SIZE
        ):  # fmt: skip
            return 0
        kind, vector, argument = ends
        displacement, immediate = len(constants.displacement), len(constants.immediate)
        if families.counts(raw):
            immediate = 0
            recipe.fix_immediate()
        at_displacement, at_immediate = constants.places
        branches = kind in (ENDS_JUMP, ENDS_BRANCH)
        exact = not recipe.shared and bool(displacement or immediate)
        distance = 0
        if exact:
            relative, distance = RELATIVE_EXACT, constants.relative
            if not -(1 << 31) <= distance < 1 << 31:
                return 0
        else:
            # A branch has its distance for an immediate, a rip-relative operand for a displacement.
            relative = RELATIVE_IMMEDIATE if branches else RELATIVE_DISPLACEMENT
            given = constants.immediate if branches else constants.displacement
            if constants.relative not in (0, int.from_bytes(given, "little", signed=True)):
                return 0
        what, shape = KIND_EXACT if exact else KIND_SHAPE, bytearray(raw)
        if not exact:
            if (registers := families.registers_of(raw)) is not None:
                fields = families.find_fields(recipe, raw, registers)
                if fields is not None:
                    recipe.set_fields(fields)
                    what, shape = KIND_FAMILY, bytearray(registers.blanked)
            shape[at_displacement : at_displacement + displacement] = bytes(displacement)
            shape[at_immediate : at_immediate + immediate] = bytes(immediate)
        key = bytes(shape).ljust(16, b"\0")
        places = (at_displacement if displacement else 0) | displacement << 8
        places |= (at_immediate if immediate else 0) << 16 | immediate << 24
        low, high = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        mode_word = mode.key | (NEAR if near else 0)
        bucket = shape_bucket(low, high, mode_word)
        at = self._take(76)
        self.bytes[at : at + 76] = _SHAPE(
            key, self._heads[bucket], places, mode_word, len(raw), recipe.reads, recipe.writes, recipe.clobbers,
            recipe.polls, kind, what, relative, vector, argument, distance, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        self._heads[bucket] = at
        return at

    def _ends(self, recipe: Recipe) -> tuple[int, int, int] | None:
        """How a recipe ends its block: (ENDS_ constant, vector or condition, argument); None: not for the composer."""
        ends = recipe.ends
        match ends:
            case None:
                return ENDS_NOT, 0, 0
            case Jump(narrow=False):
                return ENDS_JUMP, 0, 0
            case Branch(narrow=False, prelude=b""):
                return ENDS_BRANCH, ends.condition, 0
            case Indirect():
                return ENDS_INDIRECT, 0, 0
            case CallOut():
                return ENDS_CALL_OUT, 0, 0
            case Native():
                return ENDS_NATIVE, 0, OFFSETS[ends.name]
            case Raise():
                return ENDS_RAISE, ends.vector, ends.error
        return None

    def _add_simple(self, shape: int, recipe: Recipe, simple: Variant) -> None:
        """The one variant of a recipe without checks, for all cases in which it is good."""
        at = self._add_variant(simple, False, False)
        for parked, way in ((False, DEAD), (True, DEAD)):
            self._set_variant(shape, parked, way, at)
        if recipe.reads | recipe.writes:
            self._set_variant(shape, False, WANTED, at)
        else:
            self._set_variant(shape, False, UNTOUCHED, at)
            self._set_variant(shape, True, UNTOUCHED, self._add_variant(simple, True, True))

    def _add_variant(self, variant: Variant, parked: bool, fault_parked: bool) -> int:
        """The offset of a variant's record; 0 if it cannot be had."""
        code, misses, absolutes, patches = variant[:4]
        if len(code) > MAXIMUM_CODE or len(misses) > MAXIMUM_MISSES or self._used + 16 * 1024 > SIZE:
            return 0
        if any(miss.site >= 0 or miss.leads for miss in misses):
            return 0
        fields = variant.fields
        made = b"".join(
            (
                _VARIANT(
                    len(code), parked | fault_parked << 1, len(absolutes), len(patches), len(misses), len(fields)
                ),
                code, bytes(-len(code) & 7),
                *(
                    _ABSOLUTE(offset, width, distance is None, distance or 0)
                    for offset, width, distance in absolutes
                ),
                *(_PATCH(offset, width, which == IMMEDIATE) for offset, width, which in patches),
                *(_FIELD(*field) for field in fields),
                bytes(4 * (len(patches) + len(fields) & 1)),
                *(
                    _MISS(miss.jump_end, miss.retry, miss.kind_and_size, len(miss.crossing), miss.rejoin)
                    for miss in misses
                ),
            )
        )  # fmt: skip
        at = self._take(len(made))
        self.bytes[at : at + len(made)] = made
        return at

    def _take(self, size: int) -> int:
        at = self._used
        self._used = (at + size + 7) & -8
        return at

    def _set_variant(self, shape: int, parked: bool, way: int, variant: int) -> None:
        pack_into("<I", self.bytes, shape + SHAPE["S_VARIANTS"] + 4 * (parked * 4 + way), variant)

    def close(self) -> None:
        """Give the memory back to the host."""
        if self._address:
            self._heads.release()
            self.bytes.release()
            host_unmap(self._address, SIZE)
            self._address = 0


def shape_bucket(low: int, high: int, mode: int) -> int:
    """Where a shape with these two halves of its bytes is listed."""
    return ((low * HASH_LOW ^ high * HASH_HIGH) + (mode << 48) & _MASK64) >> 48
