"""`benchmarks/faults.py`: that it injects what it says, and that it finds what it looks for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fault_files
import faults
from fault_launcher import Orders, obey
from fault_worker import Bench, FaultWorker, Innocents, Row
from worker_client import Client, Wrong

ROOT = Path(__file__).parent.parent
QUICK = ("kernel", "numbers", "file", "callback", "clock")  # some 20 s on two quiet cores


@pytest.mark.slow
def test_a_few_faults_are_injected_and_every_promise_is_kept():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "faults.py", "--quick", "--json", "--only", ",".join(QUICK)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^([\w-]+): kept \(", done.stderr, re.MULTILINE) == list(QUICK)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 2 * len(QUICK)
    assert all(row["seconds"] > 0 and row["fault"] and row["happened"] and row["lost"] for row in rows)


@pytest.mark.slow
async def test_an_innocent_that_is_harmed_is_found(tmp_path: Path):
    """Other answers than alone, an error, and a connection that is cut."""
    with FaultWorker(Bench(tmp_path), orders={}) as worker:
        worker.until_ready()
        async with Client(worker.port) as client:
            innocents = Innocents(client, tokens=10)
            with pytest.raises(Wrong, match="innocent 1 has another answer than alone"):
                async with innocents:
                    innocents._alone[1].tokens[3]["id"] += 1
            innocents = Innocents(client, tokens=10)
            async with innocents:
                worker.orders.write("row", {"seed": 12, "value": "nan"})  # that of the second
                await client.until(lambda _health: "INTERNAL" in innocents.ended, "one has failed")
            with pytest.raises(Wrong, match=r"innocents ended with .*INTERNAL"):
                innocents.require_unharmed()
            worker.orders.drop("row")
            async with innocents:
                worker.process.kill()
                await worker.ended(0.0)
            with pytest.raises(Wrong, match="4 cut"):
                innocents.require_unharmed()


@pytest.mark.slow
async def test_a_worker_that_takes_a_spoilt_file_is_found(tmp_path: Path):
    """Here nothing is spoilt, so that it serves."""
    with FaultWorker(Bench(tmp_path)) as worker:
        worker.until_ready()
        assert worker.children()  # the process of the chat template
        with pytest.raises(Wrong, match="no error MODEL_LOAD_FAILED"):
            worker.require_one_sentence("MODEL_LOAD_FAILED")
        (worker.temporary / "left").touch()
        with pytest.raises(Wrong, match=r"temporary files are left: \['left'\]"):
            worker.require_no_traces(set())
        with pytest.raises(Wrong, match="has not ended after"):
            worker.exit_code(0.1)


# -- the command -------------------------------------------------------------------------------------------


async def kept(_bench: Bench) -> list[Row]:
    """Is kept."""
    return [
        Row("a fault", "nothing", 0.0125, "answer", "nothing"),
        Row("another", "it ends", None, "exit 1", ""),
    ]


async def broken(_bench: Bench) -> list[Row]:
    """Is broken."""
    raise Wrong("two answers differ")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(faults, "CASES", {"broken": broken, "kept": kept})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{faults.BEGIN}\n| an old table |\n{faults.END}\nbehind\n")
    monkeypatch.setattr(faults, "PAGE", page)
    return page


TABLE = """\
| fault | what happened | recovered after | what others lost |
| --- | --- | --- | --- |
| a fault | nothing | 12 ms to answer | nothing |
| another | it ends | exit 1 |  |
"""


def test_a_broken_promise_is_the_exit_status_and_the_rest_goes_on(cases: Path, capsys: Any):
    assert faults.main(["--markdown"]) == 1
    told = capsys.readouterr()
    assert "broken: Wrong: two answers differ (0.0 s)" in told.err and "kept: kept" in told.err
    assert told.out == TABLE
    assert "an old table" in cases.read_text()  # it tells of promises that are kept


def test_the_table_is_put_into_the_page(cases: Path, capsys: Any):
    assert faults.main(["--only", "kept", "--markdown"]) == 0
    assert cases.read_text() == f"before\n{faults.BEGIN}\n{TABLE}{faults.END}\nbehind\n"
    cases.write_text("no place")
    with pytest.raises(SystemExit, match="no place for the table"):
        faults.main(["--only", "kept", "--markdown"])


def test_cases_are_listed_and_known(cases: Path, capsys: Any):
    assert faults.main(["--list"]) == 0
    assert capsys.readouterr().out == "broken        Is broken.\nkept          Is kept.\n"
    with pytest.raises(SystemExit):
        faults.main(["--only", "kept,nobody"])
    assert "no such case: nobody" in capsys.readouterr().err


def test_the_page_has_a_table_of_what_the_command_does():
    page = faults.PAGE.read_text(encoding="utf-8")
    table = page.partition(faults.BEGIN)[2].partition(faults.END)[0].strip().splitlines()
    assert table[:2] == faults.table([]) and len(table) > 30
    for fault, *_ in (
        *fault_files.UNUSABLE,
        *((f"the model's file is {what}",) for what, *_ in fault_files.SPOILT),
    ):
        assert any(line.startswith(f"| {fault}") for line in table)


# -- orders ------------------------------------------------------------------------------------------------


def test_an_order_is_carried_out_as_often_as_it_says(tmp_path: Path):
    orders = Orders(tmp_path)
    assert orders.take("step") is None
    orders.write("step", {"error": "kernel", "times": 2})
    for _ in range(2):
        with pytest.raises(RuntimeError):
            obey(orders.take("step"))
    obey(orders.take("step"))
    orders.write("row", {"seed": 1})
    assert orders.standing("row") == orders.standing("row") == {"seed": 1}
    orders.drop("row")
    orders.drop("row")
    assert orders.standing("row") is None
    with pytest.raises(MemoryError):
        obey({"error": "memory"})
    with pytest.raises(SystemExit, match="no such error: any"):
        obey({"error": "any"})
