"""scripts/venv.sh on machines that lack something: it installs what it may, and says what it may not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "venv.sh"

# Each stands for a program, and knows of the others by the files in `state`.
APT_GET = """echo "apt-get $*" >> {state}/log
case "$*" in
    *install*venv*) : > {state}/can-venv ;;
    *install*gcc*) : > {state}/gcc-installed ;;
esac
"""
PYTHON = """if [ "$1" = -c ]; then
    case "$2" in *ensurepip*) [ -e {state}/can-venv ]; exit ;; esac
fi
if [ "$1" = -m ]; then echo "made $3" >> {state}/log; exit; fi
exec {python} "$@"
"""
ID = "echo {uid}\n"


class Bare:
    """A machine with a shell, and what a test gives it."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.tools = directory / "tools"
        self.state.mkdir()
        self.tools.mkdir()
        (self.tools / "bash").symlink_to("/bin/bash")

    def give(self, name: str, script: str, **values: object) -> None:
        tool = self.tools / name
        tool.write_text("#!/bin/bash\n" + script.format(state=self.state, **values))
        tool.chmod(0o755)

    def run(self) -> tuple[int, str, list[str]]:
        """Exit status, stderr, and what was done."""
        command = ["/bin/bash", str(SCRIPT), "the-environment"]
        environment = {"PATH": str(self.tools)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        log = self.state / "log"
        return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Bare:
    return Bare(tmp_path)


def test_root_on_debian_gets_what_is_missing(machine: Bare) -> None:
    machine.give("python3.11", PYTHON, python=sys.executable)
    machine.give("apt-get", APT_GET)
    machine.give("id", ID, uid=0)
    status, _err, log = machine.run()
    assert status == 0
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert log == [
        "apt-get update -qq",
        f"apt-get install -qq -y --no-install-recommends python{version}-venv",
        "apt-get install -qq -y --no-install-recommends gcc libc6-dev",
        "made the-environment",
    ]


def test_others_are_told_what_to_install(machine: Bare) -> None:
    machine.give("python3.11", PYTHON, python=sys.executable)
    machine.give("apt-get", APT_GET)
    machine.give("id", ID, uid=1000)
    status, err, log = machine.run()
    assert status == 1
    assert "install python3." in err
    assert log == []


def test_a_missing_compiler_stops_nobody(machine: Bare) -> None:
    machine.give("python3.11", PYTHON, python=sys.executable)
    machine.give("id", ID, uid=1000)
    (machine.state / "can-venv").touch()
    status, err, log = machine.run()
    assert status == 0
    assert "the CPU kernels will be slow" in err
    assert log == ["made the-environment"]


def test_nothing_is_installed_where_nothing_is_missing(machine: Bare) -> None:
    machine.give("python3", PYTHON, python=sys.executable)
    machine.give("cc", "")
    machine.give("apt-get", APT_GET)
    machine.give("id", ID, uid=0)
    (machine.state / "can-venv").touch()
    assert machine.run() == (0, "", ["made the-environment"])


def test_an_old_python_does_not_do(machine: Bare) -> None:
    machine.give("python3", "exit 1\n")  # as `python3 -c` exits where the version is too low
    machine.give("id", ID, uid=1000)
    status, err, _log = machine.run()
    assert status == 1
    assert "needs Python 3.11 or later" in err
