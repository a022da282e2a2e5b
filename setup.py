"""The part of the build that pyproject.toml cannot say: compile the CPU kernels into the package.

A wheel built where a C compiler exists carries the library for that kind of machine; anywhere else it carries
the sources only, and the library is compiled at first use. Building never fails for want of a compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("worker_orcd", "kernels", "cpu", "native")


class BuildWithKernels(build_py):
    """Copies the package, then compiles the kernels beside their sources."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there the sources change: compiled at first use, kept in the cache
            compile_kernels(Path(self.build_lib) / NATIVE, Path("src") / NATIVE)


class KernelsWheel(bdist_wheel):
    """A wheel is for one kind of machine if it carries a library, and for every Python 3 either way."""

    def get_tag(self) -> tuple[str, str, str]:
        _python, _abi, platform = super().get_tag()
        carried = any((Path(self.get_finalized_command("build_py").build_lib) / NATIVE).glob("*.so"))
        return "py3", "none", platform if carried else "any"


class PlatformDistribution(Distribution):
    """Tells setuptools that there is machine code, though none of it is a Python extension."""

    def has_ext_modules(self) -> bool:
        return True


def compile_kernels(target: Path, sources: Path) -> None:
    sys.path.insert(0, "src")
    from worker_orcd.kernels.cpu import build

    for stale in target.glob("*.so"):
        stale.unlink()
    try:
        build.ship_library(target, sources)
    except build.LibraryUnavailable as reason:
        print(f"the CPU kernels are not compiled into the package: {reason}", file=sys.stderr)


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": KernelsWheel})
