"""Whether weights are written over while they are multiplied: said of machine code, made up and real."""

from __future__ import annotations

import pytest

from gpu_hazards import overwritten, written

# A loop as Triton makes it: its second product goes on while the next turn begins.
LOOP = """
        /*0010*/                   LDS R9, [R8] ;
        /*0020*/                   LDSM.16.M88.4 R40, [R72+UR8] ;
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x16x16.F32 R24, R56, gdesc[UR20], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   HGMMA.64x16x16.F32 R24, R40, gdesc[UR24], R24, gsb0 ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R41], desc[UR20][R14.64], !P2 ;
        /*0090*/              @P3 BRA 0x10 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/                   IMAD.MOV.U32 R40, RZ, RZ, R3 ;
        /*00c0*/                   EXIT ;
"""


def test_a_product_that_goes_on_into_the_next_turn_is_found() -> None:
    [line] = overwritten(LOOP)
    assert line == (
        "0x60 HGMMA.64x16x16.F32 R24, R40, gdesc[UR24], R24, gsb0; 0x20 LDSM.16.M88.4 R40, [R72+UR8]"
    )


def test_it_is_not_if_the_turn_ends_with_a_wait() -> None:
    waiting = LOOP.replace("BAR.SYNC.DEFER_BLOCKING 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert overwritten(waiting) == []


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("LDS R43, [R8]", True),
        ("LDS R44, [R8]", False),
        ("LDS.64 R38, [R8]", False),
        ("LDS.64 R42, [R8]", True),
        ("LDG.E.128 R37, desc[UR20][R2.64]", True),
        ("@!P1 IMAD.WIDE R39, R2, 0x4, R4", True),
        ("STS.64 [R40], R42", False),
        ("ISETP.GT.AND P0, PT, R40, 0x2, PT", False),
        ("UMOV UR40, 0x0", False),
    ],
)
def test_whatever_writes_to_one_of_four_registers(instruction: str, found: bool) -> None:
    changed = LOOP.replace("LDSM.16.M88.4 R40, [R72+UR8]", instruction)
    assert bool(overwritten(changed)) == found


def test_the_way_out_of_a_loop_is_followed_too() -> None:
    straight = LOOP.replace("@P3 BRA 0x10", "NOP").replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP")
    [line] = overwritten(straight)  # nothing is written to R56 and those behind it
    assert line.endswith("0xb0 IMAD.MOV.U32 R40, RZ, RZ, R3")


def test_weights_from_shared_memory_take_no_registers() -> None:
    assert overwritten(LOOP.replace("R24, R40, gdesc", "R24, gdesc")) == []


@pytest.mark.parametrize(
    ("instruction", "registers"),
    [
        ("LDSM.16.M88.4 R40, [R72]", {40, 41, 42, 43}),
        ("LDSM.16.M88.2 R40, [R72]", {40, 41}),
        ("HADD2 R68, R44, -1152, -1152", {68}),
        ("SHFL.BFLY PT, R5, R4, 0x1, 0x1f", {5}),
        ("STG.E.128 desc[UR20][R2.64], R28", set()),
        ("R2UR UR4, R5", set()),
        ("EXIT", set()),
    ],
)
def test_what_an_instruction_writes_to(instruction: str, registers: set[int]) -> None:
    assert written(instruction) == registers
