"""The page about security and these tests say the same."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "security.md"


def test_every_row_has_its_test_and_every_test_its_row():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    written = {
        name
        for path in HERE.glob("test_*.py")
        if path != Path(__file__)
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert named - written == set()
    assert written - named <= {"test_defaults_are_the_bounds_that_are_documented"}
