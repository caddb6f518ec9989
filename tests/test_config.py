"""Tests of the configuration: udrv.json and the arguments of a proxy."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inco_trio.config import Board, Config, parse_board, read_board
from inco_trio.errors import ConfigError, InvalidArgumentError, ResourceError
from inco_trio.signals import BUILTIN, Direction, Signal, SignalTable, builtin_signals

IN, OUT = Direction.INBOUND, Direction.OUTBOUND
SAMPLE = Path(__file__).parent / "data" / "udrv.json"
IRQ = Path("/irq")
REGS = ("misc", "ihub_config_dev", "regs")
SIGNALS = ("misc", "inco_proxy", "signals")
MINIMAL: dict[str, Any] = {
    "file": {"ihub-irq-dev": {"path": "/irq"}, "other": {"path": "/other"}},
    "misc": {
        "ihub_config_dev": {
            "regs": {
                "redun_notify_trig": {"reg": "ihub-irq-dev.message_6_trig"},
                "ihub_hwwd_irq": {"reg": "ihub-irq-dev.message_5_state"},
                "ihub_reset_irq": {"reg": "ihub-irq-dev.message_4_state"},
            }
        },
        "inco_proxy": {"signals": {}},
    },
}


def changed(*changes: tuple[tuple[str, ...], object]) -> dict[str, Any]:
    """Return the minimal board with a value set at each key path; `...` removes the key."""
    document = copy.deepcopy(MINIMAL)
    for (*way, last), value in changes:
        table = document
        for key in way:
            table = table.setdefault(key, {})
        if value is ...:
            del table[last]
        else:
            table[last] = value
    return document


def parse(document: object) -> Board:
    return parse_board(json.dumps(document).encode(), "u.json")


def problems(text: bytes) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_board(text, "u.json")
    for problem in caught.value.problems:
        assert problem.startswith("u.json: ")
    return [problem.removeprefix("u.json: ") for problem in caught.value.problems]


def entry(direction: str, reg: str) -> dict[str, str]:
    return {"direction": direction, "reg": reg}


def test_the_sample_board_is_read() -> None:
    directory = Path("/tmp/inco-trio/devdata/dev")  # noqa: S108 - a path in the sample; the test creates no file
    assert read_board(SAMPLE) == Board(
        signals=(
            *builtin_signals(directory),
            Signal("typeb_failure_irq", IN, directory, "message_2_state"),
            Signal("ihub_crash_notify_irq", OUT, directory, "message_0_trig"),
        ),
        notes=(),
    )


@pytest.mark.parametrize(
    "misc", [..., {}, {"ihub_config_dev": {}}, {"ihub_config_dev": {"regs": {}}, "inco_proxy": {}}]
)
def test_missing_regs_use_defaults_with_a_note(misc: object) -> None:
    board = parse(changed((("misc",), misc)))
    assert board.signals == builtin_signals(IRQ)
    assert board.notes == (
        "misc.ihub_config_dev.regs.ihub_reset_irq is missing: using ihub-irq-dev.message_4_state",
        "misc.ihub_config_dev.regs.ihub_hwwd_irq is missing: using ihub-irq-dev.message_5_state",
        "misc.ihub_config_dev.regs.redun_notify_trig is missing: using ihub-irq-dev.message_6_trig",
    )


def test_one_missing_reg_has_one_note() -> None:
    board = parse(changed(((*REGS, "ihub_hwwd_irq"), ...)))
    assert board == Board(
        builtin_signals(IRQ),
        ("misc.ihub_config_dev.regs.ihub_hwwd_irq is missing: using ihub-irq-dev.message_5_state",),
    )


@pytest.mark.parametrize("builtin", BUILTIN, ids=lambda b: b.name)
def test_a_reg_moves_its_builtin_signal(builtin: Any) -> None:
    board = parse(changed(((*REGS, builtin.reg), {"reg": "other.a.b"})))
    moved = Signal(builtin.name, builtin.direction, Path("/other"), "a.b")  # A register name may contain dots.
    assert board.signals == tuple(moved if s.name == builtin.name else s for s in builtin_signals(IRQ))


@pytest.mark.parametrize("reg", [..., None, {"reg": "nowhere"}], ids=["missing", "mistyped", "invalid"])
def test_the_signals_table_overrides_a_builtin_in_its_place(reg: object) -> None:
    table = {"x": entry("inbound", "other.x"), "ihub_hwwd_irq": entry("outbound", "other.y")}
    board = parse(changed((SIGNALS, table), ((*REGS, "ihub_hwwd_irq"), reg)))
    reset, _, redun = builtin_signals(IRQ)
    other = Path("/other")
    assert board == Board(
        (reset, Signal("ihub_hwwd_irq", OUT, other, "y"), redun, Signal("x", IN, other, "x")),
        (),
    )


def test_the_order_of_the_signals_table_is_kept() -> None:
    names = ["zeta", "alpha", "mid", "b", "a"]
    board = parse(changed((SIGNALS, {name: entry("inbound", f"other.{name}") for name in names})))
    assert [signal.name for signal in board.signals[3:]] == names


def test_inbound_signals_may_share_a_state_register() -> None:
    board = parse(changed(((*SIGNALS, "x"), entry("inbound", "ihub-irq-dev.message_4_state"))))
    assert [str(s.path) for s in board.signals].count("/irq/message_4_state") == 2


@pytest.mark.parametrize("name", ["!", "~", "n" * 64, "a.b", "'", '"\\'])
def test_unusual_wire_names_are_accepted(name: str) -> None:
    assert parse(changed(((*SIGNALS, name), entry("inbound", "other.x")))).signals[-1].name == name


@pytest.mark.parametrize("junk", [None, True, 7, -1.5, "text", [], [{}], {}, {"path": 1, "reg": 2, "regs": 3}])
@pytest.mark.parametrize(
    "path",
    [
        ("spi",),
        ("file", "compatible"),
        ("file", "unused"),
        ("file", "ihub-irq-dev", "compatible"),
        ("misc", "compatible"),
        ("misc", "ihub_config_dev", "compatible"),
        (*REGS, "redun_notify_irq"),
        (*REGS, "redun_notify_trig", "privatedata"),
    ],
    ids=".".join,
)
def test_the_rest_of_the_file_is_ignored(path: tuple[str, ...], junk: object) -> None:
    assert parse(changed((path, junk))) == Board(builtin_signals(IRQ), ())


@pytest.mark.parametrize("text", [b"1" * 5000, b"-" + b"9" * 5000, b"1e999999", b"NaN", b"Infinity"])
def test_unusual_numbers_in_the_rest_are_ignored(text: bytes) -> None:
    assert parse_board(b'{"x": %s, %s' % (text, json.dumps(MINIMAL).encode()[1:]), "u.json").notes == ()


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse_board(b"\xef\xbb\xbf" + SAMPLE.read_bytes(), "u.json") == read_board(SAMPLE)


DEVICE = ("file", "ihub-irq-dev")
HWWD = (*REGS, "ihub_hwwd_irq")
X = (*SIGNALS, "x")
MISSING_DEVICE = "file.ihub-irq-dev: missing (expected a table whose path is the directory of the IRQ files)"


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("file",), None, ": null (expected a table)"),
        (("misc",), [], ": a list (expected a table)"),
        (REGS[:2], 1, ": a number (expected a table)"),
        (REGS, True, ": a boolean (expected a table)"),
        (SIGNALS[:2], "x", ": 'x' (expected a table)"),
        (SIGNALS, None, ": null (expected a table)"),
        (SIGNALS[:2], {"signal": {}}, ".signal: unknown key (expected signals)"),
        (SIGNALS[:2], {"a b": 1, "signals": {}}, ".'a b': unknown key (expected signals)"),
        (DEVICE, ..., ": missing (expected a table whose path is the directory of the IRQ files)"),
        (DEVICE, 1.5, ": a number (expected a table)"),
        (DEVICE, {}, ".path: missing (expected an absolute path)"),
        (DEVICE, {"path": {}}, ".path: a table (expected an absolute path)"),
        (DEVICE, {"path": ""}, ".path: '' (expected an absolute path)"),
        (DEVICE, {"path": "irq/x"}, ".path: 'irq/x' (expected an absolute path)"),
        (DEVICE, {"path": "/\0"}, ".path: '/\\x00' cannot be a path: it has a NUL byte or an unpaired surrogate"),
        (
            DEVICE,
            {"path": "/\ud800"},
            ".path: '/\\ud800' cannot be a path: it has a NUL byte or an unpaired surrogate",
        ),
        (DEVICE, {"path": f"/{'x' * 256}"}, f".path: a name in '/{'x' * 39}'... has more than 255 bytes"),
        (
            DEVICE,
            {"path": f"{'/' * 9}{'/xyz' * 1024}"},
            f".path: '{'/' * 9}{('/xyz' * 8)[:31]}'... has more than 4095 bytes or 256 names",
        ),
        (DEVICE, {"path": "/x" * 257}, f".path: '{'/x' * 20}'... has more than 4095 bytes or 256 names"),
        (HWWD, None, ": null (expected a table)"),
        (HWWD, {}, ".reg: missing (expected <device>.<register>)"),
        (HWWD, {"reg": None}, ".reg: null (expected <device>.<register>)"),
        (HWWD, {"reg": "nix.x"}, ".reg: 'nix' is not a device of file"),
        (HWWD, {"reg": "message"}, ".reg: 'message' (expected <device>.<register>)"),
        (X, [], ": a list (expected a table)"),
        (X, {"reg": "other.x"}, ".direction: missing (expected inbound or outbound)"),
        (X, {"direction": "inbound"}, ".reg: missing (expected <device>.<register>)"),
        (X, entry("sideways", "other.x"), ".direction: 'sideways' (expected inbound or outbound)"),
        (X, entry("INBOUND", "other.x"), ".direction: 'INBOUND' (expected inbound or outbound)"),
        (
            X,
            entry(" @ ".join([".".join(X)] * 2), "other.x"),
            f".direction: '{'.'.join(X)} @ {'.'.join(X)}' (expected inbound or outbound)",
        ),
        (X, {"direction": ["inbound"], "reg": "other.x"}, ".direction: a list (expected inbound or outbound)"),
        (X, {"direction": "inbound", "reg": 7}, ".reg: a number (expected <device>.<register>)"),
        (X, {**entry("inbound", "other.x"), "rag": 1}, ".rag: unknown key (expected one of direction, reg)"),
        (X, entry("inbound", "message"), ".reg: 'message' (expected <device>.<register>)"),
        (X, entry("inbound", ".x"), ".reg: '' is not a device of file"),
        (X, entry("inbound", "other."), ".reg: in 'other.', '' is not a file name"),
        (X, entry("inbound", "other.."), ".reg: in 'other..', '.' is not a file name"),
        (X, entry("inbound", "other..."), ".reg: in 'other...', '..' is not a file name"),
        (X, entry("inbound", "other./etc"), ".reg: in 'other./etc', '/etc' is not a file name"),
        (X, entry("inbound", "other.a/b"), ".reg: in 'other.a/b', 'a/b' is not a file name"),
        (X, entry("inbound", "other.\0"), ".reg: in 'other.\\x00', '\\x00' is not a file name"),
        (
            X,
            entry("inbound", "other." + "r" * 256),
            f".reg: in {'other.' + 'r' * 256!r}, a file name of 256 bytes is too long: at most 255",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_key(path: tuple[str, ...], value: object, problem: str) -> None:
    assert problems(json.dumps(changed((path, value))).encode()) == [".".join(path) + problem]


@pytest.mark.parametrize(
    ("direction", "register", "problem"),
    [
        ("outbound", "message_6_trig", "'/irq/message_6_trig' is already the trigger of redun_notify_irq"),
        ("inbound", "message_6_trig", "'/irq/message_6_trig' is already the trigger of redun_notify_irq"),
        ("outbound", "message_4_state", "'/irq/message_4_state' is already the state register of ihub_reset_irq"),
    ],
)
def test_a_register_in_use_is_refused(direction: str, register: str, problem: str) -> None:
    document = changed((X, entry(direction, f"ihub-irq-dev.{register}")))
    assert problems(json.dumps(document).encode()) == [f"misc.inco_proxy.signals.x.reg: {problem}"]


@pytest.mark.parametrize("name", ["", "a b", "a\n", "a\0", "é", "\ud800", "n" * 65])
def test_an_invalid_wire_name_is_refused(name: str) -> None:
    document = changed(((*SIGNALS, name), entry("inbound", "other.x")))
    why = "a wire name is 1 to 64 printable ASCII characters without spaces"
    assert problems(json.dumps(document).encode()) == [f"misc.inco_proxy.signals.{name!r}: {why}"]


def test_an_unprintable_device_name_is_quoted() -> None:
    document = changed((("file", "a\nb"), 7), (X, entry("inbound", "a\nb.x")))
    assert problems(json.dumps(document).encode()) == ["file.'a\\nb': a number (expected a table)"]


def test_the_device_is_required_even_if_no_signal_uses_it() -> None:
    table = {b.name: entry(b.direction.value, f"other.{b.register}") for b in BUILTIN}
    assert problems(json.dumps(changed((DEVICE, ...), (SIGNALS, table))).encode()) == [MISSING_DEVICE]


def test_an_empty_table_is_refused() -> None:
    assert problems(b"{}") == [MISSING_DEVICE]


def test_one_file_under_two_devices_is_one_register() -> None:
    document = changed(
        (("file", "twin", "path"), "/x/..//irq/."),
        (X, entry("outbound", "twin.message_6_trig")),
    )
    assert problems(json.dumps(document).encode()) == [
        "misc.inco_proxy.signals.x.reg: '/x/../irq/message_6_trig' is already the trigger of redun_notify_irq"
    ]


def test_an_overridden_builtin_conflicts_with_another_builtin() -> None:
    document = changed(((*SIGNALS, "ihub_reset_irq"), entry("inbound", "ihub-irq-dev.message_6_trig")))
    where = "misc.ihub_config_dev.regs.redun_notify_trig.reg"
    why = "'/irq/message_6_trig' is already the state register of ihub_reset_irq"
    assert problems(json.dumps(document).encode()) == [f"{where}: {why}"]


def test_every_mistake_is_reported_at_once() -> None:
    document = changed(
        (("file", "ihub-irq-dev", "path"), 7),
        (("file", "other"), None),
        (HWWD, {"reg": 1}),
        (X, {"direction": "sideways", "reg": "nowhere", "rag": 1}),
        ((*SIGNALS, "y"), entry("outbound", "nix.y")),
        ((*SIGNALS, "z"), entry("outbound", "other.z")),
        ((*SIGNALS, "a b"), 5),
    )
    assert sorted(problems(json.dumps(document).encode())) == [
        "file.ihub-irq-dev.path: a number (expected an absolute path)",
        "file.other: null (expected a table)",
        "misc.ihub_config_dev.regs.ihub_hwwd_irq.reg: a number (expected <device>.<register>)",
        "misc.inco_proxy.signals.'a b': a number (expected a table)",
        "misc.inco_proxy.signals.'a b': a wire name is 1 to 64 printable ASCII characters without spaces",
        "misc.inco_proxy.signals.x.direction: 'sideways' (expected inbound or outbound)",
        "misc.inco_proxy.signals.x.rag: unknown key (expected one of direction, reg)",
        "misc.inco_proxy.signals.x.reg: 'nowhere' (expected <device>.<register>)",
        "misc.inco_proxy.signals.y.reg: 'nix' is not a device of file",
    ]


@pytest.mark.parametrize(
    ("ours", "problem"),
    [
        ('{"signals": {}, "signals": {}}', "misc.inco_proxy.signals: given more than once"),
        (
            '{"signals": {"x": %(x)s, "y": %(y)s, "x": %(x)s}}',
            "misc.inco_proxy.signals.x: given more than once",
        ),
        (
            '{"signals": {"x": {"direction": "outbound", "direction": "inbound", "reg": "other.x"}}}',
            "misc.inco_proxy.signals.x.direction: given more than once",
        ),
    ],
)
def test_a_duplicate_key_in_the_signals_table_is_refused(ours: str, problem: str) -> None:
    entries = {name: json.dumps(entry("inbound", f"other.{name}")) for name in "xy"}
    text = json.dumps(changed((SIGNALS[:2], "OURS"))).replace('"OURS"', ours % entries)
    assert problems(text.encode()) == [problem]


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("file", ""),
        ("misc", ""),
        ("ihub-irq-dev", "file."),
        ("other", "file."),
        ("ihub_config_dev", "misc."),
        ("inco_proxy", "misc."),
        ("regs", "misc.ihub_config_dev."),
        ("redun_notify_trig", "misc.ihub_config_dev.regs."),
        ("ihub_hwwd_irq", "misc.ihub_config_dev.regs."),
        ("signals", "misc.inco_proxy."),
        ("x", "misc.inco_proxy.signals."),
    ],
)
def test_a_duplicate_key_that_is_read_is_refused(key: str, where: str) -> None:
    text = json.dumps(changed((X, entry("inbound", "other.x"))))
    assert text.count(f'"{key}": {{') == 1
    twice = text.replace(f'"{key}": {{', f'"{key}": {{"path": "/x", "reg": "other.y"}}, "{key}": {{')
    assert problems(twice.encode()) == [f"{where}{key}: given more than once"]


@pytest.mark.parametrize(
    ("pair", "where"),
    [
        ('"path": "/irq"', "file.ihub-irq-dev.path"),
        ('"path": "/other"', "file.other.path"),
        ('"reg": "ihub-irq-dev.message_6_trig"', "misc.ihub_config_dev.regs.redun_notify_trig.reg"),
        ('"reg": "other.x"', "misc.inco_proxy.signals.x.reg"),
    ],
)
def test_a_duplicate_value_that_is_read_is_refused(pair: str, where: str) -> None:
    text = json.dumps(changed((X, entry("inbound", "other.x"))))
    assert text.count(pair) == 1
    assert problems(text.replace(pair, f"{pair}, {pair}").encode()) == [f"{where}: given more than once"]


@pytest.mark.parametrize(
    ("once", "twice"),
    [
        ('"path": "/irq"', '"compatible": 1, "path": "/irq", "compatible": 2'),
        ('"other": {"path": "/other"}', '"other": {}, "other": {}, "another": 1, "another": {}'),
        ('"file": {', '"spi": 1, "spi": 2, "file": {'),
        ('"regs": {', '"other": 1, "other": 2, "regs": {"any": 1, "any": 2, '),
    ],
)
def test_a_duplicate_key_elsewhere_is_ignored(once: str, twice: str) -> None:
    text = json.dumps(MINIMAL)
    assert text.count(once) == 1
    assert parse_board(text.replace(once, twice).encode(), "u.json").signals == builtin_signals(IRQ)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "line 1 column 1: not JSON: Expecting value"),
        (b'{\n  "a": 1,,\n}', "line 2 column 10: not JSON: "),
        (b'{"a": "\n"}', "line 1 column 8: not JSON: Invalid control character at"),
        (b"{} {}", "line 1 column 4: not JSON: Extra data"),
        (b'{\n"a": "\xe9"}', "line 2: not UTF-8: byte 0xe9"),
        (b'\xef\xbb\xbf{\n"a": "\xe9"}', "line 2: not UTF-8: byte 0xe9"),
        ("{}".encode("utf-16"), "line 1: not UTF-8: byte 0xff"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[]", "a list (expected a table)"),
        (b'{"x": [' + b"[]," * 250_000 + b"[]]}", "more than 500,000 commas, opening brackets"),
        (b"null", "null (expected a table)"),
        (b"7", "a number (expected a table)"),
    ],
    ids=str,
)
def test_other_files_are_refused(text: bytes, problem: str) -> None:
    (found,) = problems(text)
    assert found.startswith(problem)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Run the block as the user nobody, because root can read every file."""
    uid = os.geteuid()
    os.seteuid(uid or 65534)
    try:
        yield
    finally:
        os.seteuid(uid)


def refusal(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_board(path)
    (problem,) = caught.value.problems
    assert str(caught.value) == problem
    return problem


def test_unreadable_files_are_errors(tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    assert refusal(missing) == f"{missing}: cannot be read: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    assert refusal("nul\0.json").startswith("nul\0.json: cannot be read: the path has a NUL byte")
    secret = tmp_path / "secret.json"
    secret.touch(mode=0)
    with without_privileges():
        assert refusal(secret) == f"{secret}: cannot be read: Permission denied"


def test_special_files_are_refused_without_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, kind in (
            (tmp_path / "fifo", "a FIFO"),
            (tmp_path / "socket", "a socket"),
            (Path("/dev/zero"), "a character device"),
        ):
            assert refusal(path) == f"{path}: cannot be read: it is {kind}, not a regular file"


def test_a_huge_file_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    assert refusal(huge) == f"{huge}: cannot be read: it is larger than 16 MiB"


def test_a_file_with_size_zero_in_stat_is_read() -> None:
    assert refusal("/proc/self/status").startswith("/proc/self/status: line 1 column 1: not JSON")


def test_too_many_open_files_is_not_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(ResourceError, match=r"udrv\.json: cannot be read: Too many open files$"):
        read_board(SAMPLE)


def test_problems_begin_with_the_path_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("u.json").write_text(json.dumps(changed((DEVICE, {}), (HWWD, {}))))
    with pytest.raises(ConfigError) as caught:
        read_board(".//u.json")
    assert str(caught.value).splitlines() == [
        ".//u.json: misc.ihub_config_dev.regs.ihub_hwwd_irq.reg: missing (expected <device>.<register>)",
        ".//u.json: file.ihub-irq-dev.path: missing (expected an absolute path)",
    ]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
regs = st.text(st.sampled_from("otherihub-irq-dev./\0\n \ud800é"), max_size=12) | st.just("other.x")
mistakes = st.tuples(
    st.sampled_from(
        [
            *((*SIGNALS, "x", key) for key in ("direction", "reg", "rag")),
            *((*way, "ihub_hwwd_irq") for way in (REGS, SIGNALS)),
            *(SIGNALS[:n] for n in (1, 2, 3)),
            *(REGS[:n] for n in (2, 3)),
            *(("file", "ihub-irq-dev", "path")[:n] for n in (1, 2, 3)),
        ]
    ),
    values | regs | st.dictionaries(st.text(max_size=4), st.fixed_dictionaries({"direction": regs, "reg": regs})),
)


def board_or_problems(text: bytes) -> None:
    try:
        board = parse_board(text, "u.json")
    except ConfigError as e:
        found = e.problems
    else:
        assert {b.name for b in BUILTIN} <= {signal.name for signal in board.signals}
        assert Config("rpmsg4000", board.signals).signals == board.signals
        return
    assert found
    for problem in found:
        assert problem.startswith("u.json: ")
        assert len(problem.splitlines()) == 1
        assert problem.encode()


@given(st.binary())
def test_any_bytes_are_a_board_or_an_error(text: bytes) -> None:
    board_or_problems(text)


@given(values)
def test_any_json_is_a_board_or_an_error(document: object) -> None:
    board_or_problems(json.dumps(document).encode())


@given(st.lists(mistakes, max_size=4))
def test_any_value_at_any_key_is_a_board_or_an_error(changes: list[tuple[tuple[str, ...], object]]) -> None:
    document = copy.deepcopy(MINIMAL)
    for (*way, last), value in changes:
        table: Any = document
        for key in way:
            table = table.get(key) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table[last] = value
    board_or_problems(json.dumps(document).encode())


names = st.text(st.sampled_from([chr(c) for c in range(0x21, 0x7F)]), min_size=1, max_size=64)
# Exclude the registers of built-in signals, which would be errors: Hypothesis also draws strings from our modules.
registers = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=60).filter(
    lambda text: text not in {".", "..", *(signal.register for signal in builtin_signals(Path("/")))}
)


@st.composite
def boards(draw: st.DrawFn) -> tuple[dict[str, Any], list[Signal]]:
    """Generate a board file with random devices and signals; return it with the signals that it describes."""
    plain = st.text("abcdefgh-_", min_size=1, max_size=8)
    devices = draw(st.dictionaries(plain, plain, max_size=4)) | {"ihub-irq-dev": "IRQ"}
    document: dict[str, Any] = {
        "file": {device: {"path": f"/{directory}"} for device, directory in devices.items()},
        "rest": draw(values),
    }
    expected = {s.name: s for s in builtin_signals(Path("/IRQ"))}
    table = document.setdefault("misc", {}).setdefault("inco_proxy", {}).setdefault("signals", {})
    own = draw(st.lists(names | st.sampled_from(sorted(expected)), unique=True, max_size=6))
    files = draw(st.lists(registers, unique=True, min_size=len(own), max_size=len(own)))
    for name, register in zip(own, files, strict=True):
        direction, device = draw(st.sampled_from(Direction)), draw(st.sampled_from(sorted(devices)))
        table[name] = entry(direction.value, f"{device}.{register}")
        expected[name] = Signal(name, direction, Path("/", devices[device]), register)
    return document, list(expected.values())


@given(boards())
def test_a_valid_board_gives_exactly_its_signals(board: tuple[dict[str, Any], list[Signal]]) -> None:
    document, expected = board
    found = parse(document)
    assert list(found.signals) == expected
    assert len(found.notes) == len([b for b in BUILTIN if b.name not in document["misc"]["inco_proxy"]["signals"]])


def test_config_has_defaults() -> None:
    config = Config("rpmsg4000", builtin_signals(IRQ))
    assert (config.wait_link, config.stop_deadline) == (False, 5.0)


@pytest.mark.parametrize("interface", ["a", "rpmsg4000", "i" * 15, "...", "eth0.1", "ü" * 7, "\x1f", "\x85"])
def test_valid_interface_names_are_accepted(interface: str) -> None:
    assert Config(interface, ()).link == interface


@pytest.mark.parametrize(
    "interface",
    ["", ".", "..", "i" * 16, "ü" * 8, "a/b", "eth0:1", "a b", "a\n", "a\0", "\udcff", "à"],
    ids=ascii,
)
def test_invalid_interface_names_are_refused(interface: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(interface, ())
    assert str(caught.value) == (
        f"link {interface!r}: expected unix:LOCAL,peer=REMOTE or an interface name"
        " (1 to 15 bytes of UTF-8 without '/', ':' or whitespace)"
    )


@pytest.mark.parametrize("deadline", [0, 0.5, 5, float("inf")])
def test_valid_stop_deadlines_are_accepted(deadline: float) -> None:
    assert Config("a", (), stop_deadline=deadline).stop_deadline == deadline


@pytest.mark.parametrize("deadline", [-1, -0.001, float("-inf"), float("nan")])
def test_invalid_stop_deadlines_are_refused(deadline: float) -> None:
    with pytest.raises(ConfigError, match=r"stop_deadline: .* is not a number of seconds, 0 or more"):
        Config("a", (), stop_deadline=deadline)


def test_config_reports_all_conflicting_signals_at_once() -> None:
    signals = tuple(Signal(name, OUT, IRQ, "trig") for name in ("a", "b"))
    with pytest.raises(ConfigError) as caught:
        Config("", signals, stop_deadline=-1)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "signal b",
        "link ''",
        "stop_deadline",
    ]


def test_config_and_board_are_frozen() -> None:
    for frozen in (Config("a", ()), Board((), ())):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            frozen.signals = ()  # type: ignore[misc] # the assignment is what the test checks


def test_a_signal_converts_text(tmp_path: Path) -> None:
    signal = Signal("a_irq", "inbound", str(tmp_path), "a")
    assert signal == Signal("a_irq", Direction.INBOUND, tmp_path, "a")
    assert SignalTable([signal]).inbound == {b"a_irq": signal}
    with pytest.raises(InvalidArgumentError, match="direction='in': expected 'inbound' or 'outbound'"):
        Signal("a_irq", "in", tmp_path, "a")
    assert builtin_signals(str(tmp_path)) == builtin_signals(tmp_path)


def test_a_configuration_converts_iterables_and_text(tmp_path: Path) -> None:
    config = Config("a", (signal for signal in builtin_signals(tmp_path)), netns="/run/netns/b")
    assert config == Config("a", builtin_signals(tmp_path), netns=Path("/run/netns/b"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"wait_link": "no"}, "wait_link: 'no' is not True or False"),
        ({"stop_deadline": "5"}, "stop_deadline: '5' is not a number of seconds, 0 or more"),
        ({"history": "5"}, "history: '5' is not a number from 0 to 65536"),
        ({"history": True}, "history: True is not a number from 0 to 65536"),
        ({"owner": "app"}, "owner: 'app' is not a user ID"),
        ({"group": -1}, "group: -1 is not a group ID"),
        ({"signals": ["a"]}, "signals: 'a' is not a Signal"),
        ({"link": None}, "link None: expected the name of an interface, or unix:LOCAL,peer=REMOTE"),
    ],
)
def test_values_of_the_wrong_type_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**({"link": "a", "signals": ()} | more))
    assert caught.value.problems == (said,)
