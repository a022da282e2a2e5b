"""The part of the build that pyproject.toml cannot say: compile the CPU kernels into the package."""

from __future__ import annotations

from setuptools import setup

setup()
