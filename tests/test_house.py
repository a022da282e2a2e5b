"""House rules that no tool knows: what may stand where in the repository."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from worker_orcd.version import VERSION

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "worker_orcd"
MODULES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 500
# The rule for files that are not the project's own prose or code.
NOT_OURS = ("LICENSE", "tests/data/")


def tracked() -> list[Path]:
    """Every text file of the project, whether or not git is there to ask."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.decode()
        names = [name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        kept = ("src", "tests", "docs", "benchmarks", "scripts", "requirements", ".ci")
        names = [str(file.relative_to(ROOT)) for top in kept for file in (ROOT / top).rglob("*")]
    files = [ROOT / name for name in names if not name.startswith(NOT_OURS)]
    return [file for file in files if file.is_file() and b"\0" not in file.read_bytes()[:8192]]


TRACKED = tracked()


def lines_matching(pattern: str, files: list[Path]) -> list[str]:
    """`file:line: text`, for a message that can be clicked."""
    expression = re.compile(pattern)
    return [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if expression.search(line)
    ]


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 40
    assert ROOT / "Makefile" in TRACKED


def test_no_path_of_somebodys_machine() -> None:
    """Tests may make up a path to see that it is not repeated, but never name a real one."""
    tests = ROOT / "tests"
    start = r"(?<![\w.~\]}/:-])/"
    ours = [file for file in TRACKED if not file.is_relative_to(tests)]
    theirs = [file for file in TRACKED if file.is_relative_to(tests) and file.name != "test_house.py"]
    assert lines_matching(start + r"(root|home|work|Users|opt|mnt|srv)/\w", ours) == []
    assert lines_matching(start + r"(work|opt)/\w", theirs) == []


def test_no_registry_host() -> None:
    """Where packages come from is the business of whoever installs them."""
    hosts = (
        "pypi" + ".org",
        "pythonhosted" + ".org",
        "npmjs" + ".com",
        "npmjs" + ".org",
        "pytorch" + ".org/whl",
    )
    pattern = "|".join(re.escape(host) for host in (*hosts, "anaconda" + ".org", "conda" + ".io"))
    assert lines_matching(pattern, TRACKED) == []


# -- devices ---------------------------------------------------------------------------------------------

DEVICE_MODULES = ("kernels", "runner/graphs.py", "runner/residency.py")


def test_only_kernels_ask_which_device_this_is() -> None:
    elsewhere = [
        file for file in MODULES if not file.relative_to(SOURCE).as_posix().startswith(DEVICE_MODULES)
    ]
    assert lines_matching(r"\.is_cuda|\bdevice\.type\b|torch\.cuda", elsewhere) == []


# -- code that runs code ---------------------------------------------------------------------------------

DANGEROUS_CALLS = {"eval", "exec", "compile", "__import__"}
DANGEROUS_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
DANGEROUS_ATTRIBUTES = {("torch", "load"), ("os", "system"), ("os", "popen"), ("yaml", "load")}


def dangers(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, what) of everything that could turn data into code."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in DANGEROUS_CALLS:
                found.append((node.lineno, name))
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in DANGEROUS_ATTRIBUTES:
                found.append((node.lineno, f"{owner}.{name}"))
            case ast.Import(names=aliases):
                found += [(node.lineno, a.name) for a in aliases if a.name.split(".")[0] in DANGEROUS_MODULES]
            case ast.ImportFrom(module=str(name)) if name.split(".")[0] in DANGEROUS_MODULES:
                found.append((node.lineno, name))
            case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                found.append((node.value.lineno, "shell=True"))
            case ast.keyword(arg="trust_remote_code" | "allow_pickle", value=ast.Constant(value=True)):
                found.append((node.value.lineno, str(node.arg)))
            case _:
                pass
    return found


@pytest.mark.parametrize(
    "code",
    ["eval('1')", "import pickle", "from pickle import loads", "torch.load(f)", "run('ls', shell=True)"],
)
def test_the_search_for_dangers_finds_them(code: str) -> None:
    assert dangers(ast.parse(code))


@pytest.mark.parametrize("code", ["backend.compile(f)", "re.compile('x')", "model.eval()", "json.load(f)"])
def test_the_search_for_dangers_leaves_the_harmless_alone(code: str) -> None:
    assert not dangers(ast.parse(code))


def test_no_data_becomes_code() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file in MODULES
        for line, what in dangers(ast.parse(file.read_text()))
    ]
    assert found == []


# -- shape -----------------------------------------------------------------------------------------------


def test_no_file_is_long() -> None:
    code = [file for file in TRACKED if file.suffix in (".py", ".c", ".h", ".js", ".css")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in code}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "base", "helpers", "helper", "misc", "manager"}
    assert [str(file) for file in MODULES if file.stem in drawers or file.parent.name in drawers] == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        file
        for file in MODULES
        if file.read_text().strip() and not ast.get_docstring(ast.parse(file.read_text()))
    ]
    assert [str(file.relative_to(ROOT)) for file in silent] == []


def test_nothing_is_left_to_do() -> None:
    pattern = r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError"
    assert lines_matching(pattern, MODULES) == []


def test_tests_mirror_the_packages() -> None:
    packages = {init.parent.name for init in SOURCE.glob("*/__init__.py")}
    tested = {
        path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))
    }
    assert packages - tested == set()


# -- what is said once -----------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere() -> None:
    assert metadata.version("worker-orcd") == VERSION
    first = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] in (VERSION, "Unreleased")


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    needed += [
        line for line in (ROOT / "requirements" / "dev.txt").read_text().splitlines() if line[:1].isalpha()
    ]
    reasons = (ROOT / "docs" / "dependencies.md").read_text().lower().replace("_", "-")
    missing = [line for line in needed if f"`{re.split(r'[^A-Za-z0-9_-]', line)[0].lower()}`" not in reasons]
    assert missing == []


def test_every_dependency_is_pinned() -> None:
    pins = (ROOT / "requirements" / "constraints.txt").read_text()
    pinned = {line.partition("==")[0] for line in pins.splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(ROOT / "requirements" / "dev.txt").read_text().splitlines()]
    names = {re.split(r"[^A-Za-z0-9_-]", line)[0].lower() for line in needed if line[:1].isalpha()}
    assert names - pinned == set()


def commands_in_docs() -> list[tuple[str, str]]:
    """(document, command line) of every `worker-orcd …` that a document shows."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        (str(document.relative_to(ROOT)), line.strip().removeprefix("$ "))
        for document in documents
        for block in re.findall(r"```(?:sh|bash|console|text)?\n(.*?)```", document.read_text(), re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip().removeprefix("$ ").startswith("worker-orcd ")
    ]


def test_commands_in_documents_exist() -> None:
    import typer.main

    from worker_orcd.cli.app import build

    group = typer.main.get_command(build())
    commands = group.commands  # type: ignore[attr-defined]
    shown = commands_in_docs()
    assert shown
    for document, line in shown:
        words = line.split("#")[0].split()
        assert words[1] in commands, f"{document}: {line}"
        options = {name for p in commands[words[1]].params for name in (*p.opts, *p.secondary_opts)}
        for word in words[2:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in options | {"--help"}, f"{document}: {line}"


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(document.read_text() for document in documents if document.exists())
    shown = set(re.findall(r"(?:`|^\s*\$?\s*)make ([a-z-]+)", text, re.MULTILINE))
    assert shown
    assert shown - targets == set()


def test_links_in_documents_lead_somewhere() -> None:
    broken: list[str] = []
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
            if not re.match(r"[a-z]+:", target) and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert broken == []


def test_the_page_about_adding_an_architecture_shows_the_code() -> None:
    page = (ROOT / "docs" / "adding-an-architecture.md").read_text(encoding="utf-8")
    adapter = (SOURCE / "model" / "architectures" / "qwen2.py").read_text(encoding="utf-8")
    assert f"```python\n{adapter}```" in page
    added = re.findall(r"^\+(.*)$", page, re.MULTILINE)
    assert len(added) + len(adapter.splitlines()) <= 60
    code = "".join(
        path.read_text(encoding="utf-8")
        for path in (
            SOURCE / "model" / "architectures" / "__init__.py",
            ROOT / "tests" / "model" / "tiny_models.py",
        )
    )
    for line in added[1:]:  # the first is the import, which has grown
        assert line in code, line
