"""scripts/check_registers.py: what nvdisasm lists of a kernel, and which uniform registers nothing in it writes."""

from __future__ import annotations

from types import ModuleType

import pytest

from helpers import scripts

WHOLE = """
        /*0000*/                   ULDC.64 UR8, c[0x0][0x208] ;
        /*0010*/                   S2UR UR26, SR_CgaCtaId ;
        /*0020*/                   UMOV UR27, 0x120 ;
        /*0030*/               @P0 LDGSTS.E.BYPASS.LTC128B.128 [R28+UR26], desc[UR27][R40.64], !P5 ;
        /*0040*/                   LDG.E R4, desc[UR9][R4.64] ;
        /*0050*/                   EXIT ;
"""


@pytest.fixture
def script() -> ModuleType:
    return scripts.script("check_registers")


def test_a_kernel_that_writes_what_it_reads_has_lost_nothing(script: ModuleType) -> None:
    assert script.unwritten(WHOLE) == {}


def test_a_forgotten_register_is_told_with_its_first_reader(script: ModuleType) -> None:
    forgotten = WHOLE.replace("UR26]", "UR0]").replace("UR27]", "UR1]")
    lost = script.unwritten(forgotten)
    assert set(lost) == {0, 1} and all("LDGSTS" in line and "/*0030*/" in line for line in lost.values())


@pytest.mark.parametrize(
    ("line", "lost"),
    [
        ("UISETP.NE.AND UP0, UPT, UR4, URZ, UPT", {4}),  # a predicate is no register
        ("UIADD3 UR4, UP0, UR4, 0x1, URZ", set()),
        ("ULOP3.LUT UP0, UR5, UR6, 0xf, URZ, 0xc0, !UPT", {6}),
        ("LDCU.128 UR20, c[0x0][0x358]", set()),
        ("UTMALDG.4D [UR8], [UR10], desc[UR12]", {8, 10, 12}),
        ("BAR.SYNC.DEFER_BLOCKING UR4, 0x80", {4}),  # nothing is written where no result comes first
        ("R2UR UR5, R12", set()),
        ("REDUX.MAX.S32 UR4, R23", set()),
        ("VOTEU.ANY UR4, UPT, PT", set()),
        ("IADD3 R19, R10, UR5, R8", {5}),
    ],
)
def test_what_an_instruction_reads(script: ModuleType, line: str, lost: set[int]) -> None:
    assert set(script.unwritten(f"        /*0000*/                   {line} ;\n")) == lost


def test_wide_results_are_several_registers(script: ModuleType) -> None:
    text = "/*0000*/ LDCU.128 UR20, c[0x0][0x358] ;\n/*0010*/ UIMAD.WIDE UR4, UR20, UR23, URZ ;\n/*0020*/ MOV R1, UR5 ;"
    assert script.unwritten(text) == {}
    assert set(script.unwritten(text.replace("UR23", "UR24").replace("UR5", "UR6"))) == {24, 6}
