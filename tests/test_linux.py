"""Tests of the package `linux`, the only place for Linux constants and for calls to C functions."""

from __future__ import annotations

import ast
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

import pytest

import inco_trio
from inco_trio.linux import files, rtnetlink
from inco_trio.linux.files import TARGETS_MAX, Resolver, is_path, kind_of_file
from inco_trio.linux.libc import check, libc
from inco_trio.linux.netns import CLONE_NEWNET, entered, identity

PROJECT = Path(__file__).parents[1]
PACKAGE = Path(inco_trio.__file__).parent
LINUX = PACKAGE / "linux"


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_linux_imports_nothing_else_of_the_package() -> None:
    found = {name for path in LINUX.glob("*.py") for name in imports(path) if name.startswith("inco_trio")}
    assert found == {"inco_trio.linux.bpf", "inco_trio.linux.files", "inco_trio.linux.libc"}


def test_only_linux_loads_libc_and_defines_kernel_constants() -> None:
    places = (PACKAGE, PROJECT / "netns", PROJECT / "tests")
    texts = {path: path.read_text() for place in places for path in place.rglob("*.py")}
    words = {"CDLL", "CLONE_NEWNET", "PR_SET_PDEATHSIG", "SO_PEEK_OFF", "PACKET_STATISTICS", "CAP_NET_RAW"}
    trees = {path: ast.parse(text) for path, text in texts.items() if any(word in text for word in words)}
    found = {
        (path.name, target.id)
        for path, tree in trees.items()
        if not path.is_relative_to(LINUX)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in words
    }
    assert found == set()
    loading = [
        path.name
        for path, tree in trees.items()
        if any(isinstance(node, ast.Attribute) and node.attr == "CDLL" for node in ast.walk(tree))
    ]
    assert loading == ["libc.py"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (stat.S_IFREG, "a file"),
        (stat.S_IFDIR, "a directory"),
        (stat.S_IFIFO, "a FIFO"),
        (stat.S_IFLNK, "a symlink"),
        (stat.S_IFSOCK, "a socket"),
        (stat.S_IFCHR, "a character device"),
        (stat.S_IFBLK, "a block device"),
    ],
)
def test_kinds_of_files_have_names(kind: int, words: str) -> None:
    assert kind_of_file(kind | 0o644) == words


def test_paths_without_nul_and_surrogates_are_valid() -> None:
    assert [is_path(text) for text in ("/a", "", "a\0b", "\ud800")] == [True, True, False, False]


def test_a_failed_c_call_raises_os_error() -> None:
    with pytest.raises(OSError, match=r"Bad file descriptor.*nowhere"):
        check(libc.setns(-1, CLONE_NEWNET), "nowhere")


def test_namespace_none_means_the_current_one(tmp_path: Path) -> None:
    before = identity(None)
    with entered(None):
        assert identity(None) == before
    with pytest.raises(FileNotFoundError):
        entered(tmp_path / "missing")
    assert identity(tmp_path / "missing") == (0, 0)


@pytest.mark.parametrize(
    "path",
    [
        "a/b/file", "a/./b//..", "up/b/file", "absolute/b", "up", "chain/file", "a/b/missing/..", "a/missing/x",
        "a/b/file/x", "../../a", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("mounted", [True, False])
def test_a_path_is_resolved_without_its_symlinks(
    path: str, mounted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").touch()
    (tmp_path / "a/up").symlink_to("../a/./")
    (tmp_path / "up").symlink_to("a/up")
    (tmp_path / "absolute").symlink_to(tmp_path / "up")
    (tmp_path / "chain").symlink_to("absolute/b")

    def without_proc(_: int) -> int:
        raise FileNotFoundError

    if not mounted:
        monkeypatch.setattr(files, "mount_id", without_proc)
    monkeypatch.chdir(tmp_path)
    before = len([*Path("/proc/self/fd").iterdir()])
    with closing(Resolver()) as resolver:
        # The second path has a common beginning with the first one.
        for each in (path, tmp_path / path, path):
            assert resolver.resolve(each) == os.path.realpath(each)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_a_loop_of_symlinks_is_not_followed_forever(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with closing(Resolver()) as resolver:
        assert resolver.resolve(tmp_path / "a").startswith(f"{tmp_path}/")
        with pytest.raises(OSError, match="Too many levels"):
            resolver.open(tmp_path / "a")
        assert stat.S_ISLNK(os.fstat(resolver.open(tmp_path / "a", follow=False)).st_mode)


def test_the_components_in_the_targets_of_symlinks_are_limited(tmp_path: Path) -> None:
    """A few symlinks could otherwise lead through thousands of directories."""
    (tmp_path / "a").mkdir()
    half = TARGETS_MAX // 2
    (tmp_path / "first").symlink_to("a/../" * (half // 2))
    (tmp_path / "second").symlink_to("a/../" * (half // 2 - 1) + "./first/.")
    (tmp_path / "third").symlink_to("second/.//.")
    deep = tmp_path / ("a/../" * TARGETS_MAX) / "second"
    with closing(Resolver()) as resolver:
        # The path itself is not limited: another user cannot make it long.
        assert os.path.samestat(os.fstat(resolver.open(deep)), tmp_path.stat())
        (tmp_path / "second").unlink()
        (tmp_path / "second").symlink_to("a/../" * (half // 2) + "first")
        with pytest.raises(OSError, match="Too many levels"):
            resolver.open(deep)
        assert resolver.resolve(tmp_path / "third").startswith(f"{tmp_path}/")


@pytest.mark.parametrize("order", ["little", "big"])
def test_numbers_of_an_interface_are_in_the_byte_order_of_the_machine(
    order: Literal["little", "big"], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        rtnetlink.IFLA_MASTER: 1,
        rtnetlink.IFLA_MTU: 1500,
        rtnetlink.IFLA_LINK: 3,
        rtnetlink.IFLA_CARRIER_DOWN_COUNT: 4,
    }
    attributes = [rtnetlink._attribute(kind, value.to_bytes(4, order)) for kind, value in values.items()]
    operstate = rtnetlink._attribute(rtnetlink.IFLA_OPERSTATE, bytes([rtnetlink.IF_OPER_UP]))
    monkeypatch.setattr(sys, "byteorder", order)
    found = rtnetlink._parse(rtnetlink._INTERFACE.pack(0, 0, 7, 0, 0) + b"".join([*attributes, operstate]))
    assert (found.index, found.master, found.mtu, found.below, found.downs, found.state) == (7, 1, 1500, 3, 4, "UP")
