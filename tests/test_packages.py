"""Tests that the packaging files agree with the project. Nox sessions such as `deb` build and test the packages."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from packages import deb, unit, wheels

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKED = {wheels.name_of(line): Requirement(line) for line in wheels.requirements()}


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *EXTRAS["mqtt"], *EXTRAS["rich"]])
def test_the_lock_file_has_an_allowed_version_of_each_dependency(text: str) -> None:
    wanted = Requirement(text)
    (exact,) = LOCKED[wheels.name_of(wanted.name)].specifier
    assert wanted.specifier.contains(exact.version), "run `nox -s lock`"


def test_requirements_for_pip_download_have_hashes_and_no_markers() -> None:
    lines = wheels.requirements(hashes=True, markers=False)
    assert len(lines) == len(LOCKED)
    assert all("==" in line and " --hash=sha256:" in line and ";" not in line for line in lines)


def test_the_unit_of_the_packages_is_up_to_date() -> None:
    assert unit.PATH.read_text() == unit.unit(), "run `nox -s generated`"


def test_the_copyright_file_names_each_dependency_in_the_debian_package() -> None:
    text = (ROOT / "packages/debian/copyright").read_text()
    vendored = LOCKED.keys() - deb.OF_DEBIAN - deb.OPTIONAL
    assert [name for name in sorted(vendored) if f"vendor/{name.replace('-', '_')}-*\n" not in text] == []
