"""
Registers that a Hopper tensor core may still be reading when something else is written to them.

`wgmma` runs on behind the instructions that follow it, and its left operand may come from registers, which
the assembler then takes for free: PTX leaves it to whoever wrote the code to wait before they are used again.
In a loop that lets its last product go on into the next turn nobody waits, and once in a million programs,
when tensor cores are late, eight rows of a matrix are wrong. `overwritten` finds such places in machine code.
"""

from __future__ import annotations

import re

_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;")
_PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0")
_JUMP = re.compile(r"\bBRA\b.*0x([0-9a-f]+)")
_INSTRUCTION = re.compile(r"(?:@!?U?P[T\d]+ )?([A-Z][A-Z0-9_.]*)\s+(.*)")
_FIRST_REGISTER = re.compile(r"(?:!?U?P[T\d]+, )?R(\d+)\b")
_OPERAND_REGISTERS = 4  # of a thread, for 16 columns of weights
# Those whose first register is read, or that have none.
_READERS = frozenset({
    "ST", "STG", "STS", "STL", "ATOMS", "RED", "LDGSTS", "BAR", "BRA", "EXIT", "HGMMA", "WARPGROUP",
    "DEPBAR", "LDGDEPBAR", "MEMBAR", "CCTL", "R2UR", "UTMALDG", "UTMASTG", "SYNCS", "ISETP", "FSETP",
    "HSETP2", "DSETP", "PLOP3", "BSSY", "BSYNC", "WARPSYNC", "CALL", "RET", "NOP",
})  # fmt: skip


def overwritten(sass: str) -> list[str]:
    """A line for each product whose operand is written to, on some way through the code, before a wait."""
    code = [(int(at, 16), text) for at, text in _LINE.findall(sass)]
    places = {at: index for index, (at, _) in enumerate(code)}
    found: list[str] = []
    for index, (at, text) in enumerate(code):
        product = _PRODUCT.search(text)
        if product is not None:
            first = int(product[1])
            operand = frozenset(range(first, first + _OPERAND_REGISTERS))
            writer = _first_writer(code, places, index + 1, operand)
            if writer is not None:
                found.append(f"{at:#x} {text}; {code[writer][0]:#x} {code[writer][1]}")
    return found


def _first_writer(
    code: list[tuple[int, str]], places: dict[int, int], start: int, operand: frozenset[int]
) -> int | None:
    """Which instruction writes to `operand` before a wait, if any way from `start` leads to one."""
    ways, seen = [start], set[int]()
    while ways:
        index = ways.pop()
        while index < len(code) and index not in seen:
            seen.add(index)
            text = code[index][1]
            if _WAIT.search(text):
                break
            if written(text) & operand:
                return index
            jump = _JUMP.search(text)
            if jump is not None and int(jump[1], 16) in places:
                ways.append(places[int(jump[1], 16)])
            if not text.startswith("@") and (jump is not None or text.startswith("EXIT")):
                break
            index += 1
    return None


def written(text: str) -> frozenset[int]:
    """The registers that an instruction writes to."""
    parts = _INSTRUCTION.match(text)
    if parts is None or parts[1].split(".")[0] in _READERS or parts[1].startswith("U"):
        return frozenset()
    register = _FIRST_REGISTER.match(parts[2])
    if register is None:
        return frozenset()
    modifiers = parts[1].split(".")
    count = 1
    if "128" in modifiers or (modifiers[0] == "LDSM" and modifiers[-1] == "4"):
        count = 4
    elif "64" in modifiers or "WIDE" in modifiers or (modifiers[0] == "LDSM" and modifiers[-1] == "2"):
        count = 2
    return frozenset(range(int(register[1]), int(register[1]) + count))
