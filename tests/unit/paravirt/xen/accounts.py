"""The frame table of a domain held against all that uses frames, counted anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from trivisor.machine.memory import PAGE_SIZE
from trivisor.paravirt.xen import abi
from trivisor.paravirt.xen.domain import Domain
from trivisor.paravirt.xen.frames import DESCRIPTORS, DOMAIN, L1, L4, WRITABLE

_PRESENT, _WRITE, _USER, _LARGE = 1, 2, 4, 0x80
_ADDRESS = (1 << 52) - PAGE_SIZE


class Accounts:
    """Uses of each frame as (frame, kind), and references to each."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.uses: Counter[tuple[int, int]] = Counter()
        self.references: Counter[int] = Counter()

    def use(self, frame: int, kind: int | None) -> None:
        self.references[frame] += 1
        if kind is not None:
            self.uses[frame, kind] += 1

    def table(self, table: int, level: int) -> None:
        """What the entries of a validated page table use; none is what it may not be."""
        frames = self.domain.frames
        for index, entry in enumerate(frames.words[table * 512 : table * 512 + 512].tolist()):
            if level == L4 and abi.FIRST_XEN_SLOT <= index <= abi.LAST_XEN_SLOT:
                assert entry == self.domain.own.slots[index - abi.FIRST_XEN_SLOT], "Xen's own"
                continue
            if not entry & _PRESENT:
                continue
            assert not entry & (_LARGE if level > L1 else 0) and not entry >> 52 & 0x7FF
            target = (entry & _ADDRESS) >> 12
            if level == L1:
                self.use(target, WRITABLE if entry & _WRITE else None)
            else:
                self.use(target, level - 1)


def check_accounts(domain: Domain, rings: Iterable[int] = ()) -> None:
    """Every kind, count and reference follows from page tables, pins, roots, GDT, grants, `rings` and vcpu_info."""
    domain.tables.drop_lingering()
    frames, state, own = domain.frames, domain.state, domain.own
    accounts = Accounts(domain)
    for frame in range(frames.count):
        if L1 <= frames.kind[frame] <= L4 and frames.kind_count[frame]:
            accounts.table(frame, frames.kind[frame])
        if frames.pinned[frame]:
            accounts.use(frame, frames.kind[frame])
    for root in filter(None, (state.kernel_root, state.user_root)):
        accounts.use(root, L4)
    for frame in state.gdt_frames:
        accounts.use(frame, DESCRIPTORS)
    for mapping in domain.grant_maps.mappings.values():
        for way in (abi.GNTMAP_HOST_MAP, abi.GNTMAP_DEVICE_MAP):
            if mapping.flags & way:
                accounts.use(mapping.frame, WRITABLE if mapping.writable else None)
    if domain.events.vcpu_info // PAGE_SIZE != own.shared_info:
        accounts.use(domain.events.vcpu_info // PAGE_SIZE, WRITABLE)
    for frame in rings:
        accounts.use(frame, WRITABLE)
    shared = {own.shared_info, *own.grant_frames, *domain.grants.status_shared()}
    for frame in shared:
        accounts.use(frame, WRITABLE)
    _compare(accounts, shared)


def _compare(accounts: Accounts, shared: set[int]) -> None:
    domain = accounts.domain
    frames, own = domain.frames, domain.own
    owned = 0
    for frame in range(own.end, frames.count):
        accounts.references[frame] += frames._allocated[frame]
        mine = frames.owner[frame] == DOMAIN
        owned += mine
        assert mine == bool(accounts.references[frame]), f"frame {frame:#x} is used, and whose is it?"
    free = frames.free_frames()
    assert owned == frames.owned and len(set(free)) == len(free)
    assert not any(frames.owner[frame] for frame in free)
    map_frames = range(own._map_at // 512, own._map_at // 512 + -(-8 * own.entries // PAGE_SIZE))
    for frame in {*range(own.end, frames.count), *shared}:
        assert frames.references[frame] == accounts.references[frame], f"references to {frame:#x}"
        kinds = [kind for kind in range(L1, WRITABLE + 1) if accounts.uses[frame, kind]]
        assert len(kinds) <= 1, f"frame {frame:#x} is used as {kinds}"
        count = accounts.uses[frame, kinds[0]] if kinds else 0
        assert frames.kind_count[frame] == count and (not count or frames.kind[frame] == kinds[0])
    for frame, uses in accounts.references.items():
        assert not uses or frames.owns(frame), f"frame {frame:#x} is not the domain's"
    for frame in map_frames:
        assert not accounts.uses[frame, WRITABLE], "the machine-to-physical table is read-only"
