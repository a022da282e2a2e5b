"""Write what the project's dependencies resolve to in this environment as exact pins: `make constraints`."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def requirements_of(name: str, extras: frozenset[str]) -> list[Requirement]:
    wanted: list[Requirement] = []
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
            wanted.append(requirement)
    return wanted


def closure(roots: list[Requirement]) -> dict[str, str]:
    """Canonical name -> version of everything the roots need here."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(roots)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            version = distribution(name).version
        except PackageNotFoundError:
            sys.exit(f"{requirement} is not installed here; pin what is installed by `make test` first")
        versions[name] = version.partition("+")[0]  # a local build (+cpu) satisfies the public version
        todo += requirements_of(name, key[1])
    return versions


def main() -> None:
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    roots = [Requirement(line) for line in lines if re.match(r"\w", line)]
    pins = closure([*roots, Requirement("worker-orcd[plot]")])
    del pins["worker-orcd"]
    text = "# What `make` installs, exactly. Written by `make constraints`; ranges stand in pyproject.toml.\n"
    text += "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
    Path(sys.argv[1]).write_text(text)


if __name__ == "__main__":
    main()
