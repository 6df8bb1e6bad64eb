"""What a guest's kernel is told of AVX-512 where its programs see the host's."""

from __future__ import annotations

import pytest

from trivisor.hardware.kvm.direct import avx512
from trivisor.hardware.kvm.direct.avx512 import with_avx512
from trivisor.x86.cpuid import FEATURES, Registers

HOST: dict[tuple[int, int], Registers] = {
    (7, 0): (1, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), (0xD, 5): (64, 832, 0, 0), (0xD, 6): (512, 896, 0, 0),
    (0xD, 7): (1024, 1408, 0, 0), (0xD, 9): (8, 2432, 0, 0),
}  # fmt: skip
"""As an AMD EPYC has the areas."""


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avx512, "host_cpuid", lambda leaf, subleaf=0: HOST.get((leaf, subleaf), (0, 0, 0, 0)))


def test_its_features_are_the_hosts_and_no_others() -> None:
    told = with_avx512(7, 0, (0, 1, 2, 4), 7)
    names = {name for name, (leaf, subleaf, _, _) in FEATURES.items() if (leaf, subleaf) == (7, 0)}
    shown = {name for name in names if told[FEATURES[name].register] >> FEATURES[name].bit & 1}
    assert {name for name in names if name.startswith("avx512")} <= shown
    assert {name for name in shown if not name.startswith("avx512")} <= {
        name for name in names if (0, 1, 2, 4)[FEATURES[name].register] >> FEATURES[name].bit & 1
    }
    assert told[0] == 0
    assert with_avx512(1, 0, (9, 8, 7, 6), 7) == (9, 8, 7, 6)


@pytest.mark.parametrize(("xcr0", "now"), [(1, 576), (7, 832), (0x27, 896), (0xE7, 2432), (0x2E7, 2440)])
def test_the_area_has_room_for_what_is_in_use(xcr0: int, now: int) -> None:
    assert with_avx512(0xD, 0, (0x207, 832, 2440, 0), xcr0) == (0x2E7, now, 2440, 0)
    assert with_avx512(0xD, 0, (7, 832, 832, 5), xcr0) == (0xE7, now, 2432, 5)


def test_the_compacted_area_has_no_gaps() -> None:
    assert with_avx512(0xD, 1, (3, 0, 0, 0), 0xE7) == (3, 576 + 256 + 64 + 512 + 1024, 0, 0)
    assert with_avx512(0xD, 1, (3, 0, 0, 0), 0x201) == (3, 584, 0, 0)
    assert with_avx512(0xD, 1, (1, 0, 0, 0), 0xE7) == (1, 0, 0, 0), "where there is no such format"


def test_components_are_the_hosts() -> None:
    assert with_avx512(0xD, 6, (0, 0, 0, 0), 7) == (512, 896, 0, 0)
    assert with_avx512(0xD, 2, (256, 576, 0, 0), 7) == (256, 576, 0, 0)
