"""Tests of `inco-trio plot`: the numbers are exact, and the picture contains the expected text."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest

from inco_trio.capture.pcapng import interface_block, section_block
from inco_trio.capture.recording import Entry, Mark, Recorder
from inco_trio.capture.summary import Flow, Pair, Summary
from inco_trio.capture.summary import _spread as spread
from inco_trio.cli.plot import _read
from inco_trio.errors import RecordingError
from inco_trio.frame import encode
from inco_trio.signals import Direction, SignalTable
from netns.hang import HANG
from tests.support_control import COMMAND, MAC

IN, OUT = "ihub_hwwd_irq", "redun_notify_irq"
SECOND = 10**9


def plot(*words: str | Path, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{code}\nfrom inco_trio.cli import main; import sys; sys.exit(main())"]
    whole = [*command, "plot", *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "UDRV_JSON_PATH"}
    return subprocess.run(whole, capture_output=True, text=True, timeout=HANG, check=False, env=environment)


@pytest.fixture
def night(tmp_path: Path) -> Path:
    """Write a recording: three notifications 1 s apart, two answers (after 250 and 500 ms), and a surplus answer.

    After that, the link goes down.
    """
    recorder = Recorder(tmp_path / "night.pcapng")
    for time_ns, way, name in (
        (0, Direction.OUTBOUND, OUT),
        (SECOND // 4, Direction.INBOUND, IN),
        (SECOND, Direction.OUTBOUND, OUT),
        (2 * SECOND, Direction.OUTBOUND, OUT),
        (5 * SECOND // 2, Direction.INBOUND, IN),
        (5 * SECOND // 2, Direction.INBOUND, IN),
    ):
        recorder.append(time_ns, way, name, "", encode(name.encode(), MAC), "rpmsg4000")
    recorder.mark(4 * SECOND, "the link went down")
    recorder.close()
    return tmp_path / "night.pcapng"


def test_the_numbers_are_exact(night: Path) -> None:
    done = plot(night, "--json", "--pair", OUT, IN)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "version": 1,
        "file": str(night),
        "from": 0,
        "to": 4,
        "signals": [
            {
                "board": "rpmsg4000",
                "signal": OUT,
                "direction": "outbound",
                "count": 3,
                "pending": 0,
                "late": 0,
                "delay": None,
                "possibly_late": 0,
                "rate": 0.75,
                "interval": {"min": 1, "p50": 1, "p90": 1, "p99": 1, "max": 1},
                "longest_gap": {"from": 2, "seconds": 2},
            },
            {
                "board": "rpmsg4000",
                "signal": IN,
                "direction": "inbound",
                "count": 3,
                "pending": 0,
                "late": 0,
                "delay": None,
                "possibly_late": 0,
                "rate": 0.75,
                "interval": {"min": 0, "p50": 0, "p90": 2.25, "p99": 2.25, "max": 2.25},
                "longest_gap": {"from": 0.25, "seconds": 2.25},
            },
        ],
        "pairs": [
            {
                "signal": OUT,
                "answer": IN,
                "answered": 2,
                "unanswered": 1,
                "taken": {"min": 0.25, "p50": 0.25, "p90": 0.5, "p99": 0.5, "max": 0.5},
            }
        ],
        "ignored": 0,
        "left_out": {},
        "marks": [{"time": 4, "text": "the link went down"}],
    }
    assert sorted(path.name for path in night.parent.iterdir()) == ["night.pcapng"]


def test_a_single_notification_can_be_plotted() -> None:
    summary = Summary([Pair("a", "b")])
    summary.take(Entry(5, "a", None))
    summary.pairs[0].end()
    signals = summary.numbers()["signals"]
    assert isinstance(signals, list)
    (flow,) = signals
    assert (flow["count"], flow["rate"], flow["interval"], flow["longest_gap"]) == (1, None, None, None)
    assert (summary.pairs[0].unanswered, len(summary.pairs[0].taken)) == (1, 0)
    summary.take(Mark(5 + SECOND, "x"))
    assert summary.span == (5, 5 + SECOND)
    signals = summary.numbers()["signals"]
    assert isinstance(signals, list)
    assert signals[0]["longest_gap"] == {"from": 5 / SECOND, "seconds": 1}


@pytest.mark.tools
def test_the_picture_contains_the_expected_text(night: Path) -> None:
    done = plot(night, "--pair", OUT, IN)
    picture = night.with_suffix(".svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"6 notifications and 1 marks plotted to {picture}\n"
    assert {
        "night.pcapng: 6 notifications",
        f"{OUT} (outbound): 3",
        f"{IN} (inbound): 3",
        "the link went down",
        "2.25 s",
        "local time (UTC)",
        f"{OUT} (outbound): at most 0.75/s",
        f"from {OUT} to {IN}: 2 answered, 1 not; half within 250 ms, 99 % within 500 ms",
        "00:00:04.000",
    } <= {re.sub(r"^1 +", "", text) for text in comments(picture)}


@pytest.mark.tools
def test_the_picture_names_the_time_zone(night: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    assert plot(night).returncode == 0
    assert {"local time (IST, UTC+05:30)", "05:30:02.0", "1970-01-01"} <= comments(night.with_suffix(".svg"))


def drawn(times: list[int], marks: list[Mark]) -> set[str]:
    """Return the text in a picture that shows notifications at `times` (in nanoseconds) and `marks`."""
    from inco_trio.capture.picture import draw

    summary = Summary()
    for time in times:
        summary.take(Entry(time, "a", Direction.INBOUND))
    for mark in marks:
        summary.take(mark)
    return texts(draw(summary, "", ".svg").decode())


@pytest.mark.tools
def test_durations_and_rates_have_readable_units() -> None:
    hour = 3600 * SECOND
    for times, gap, rate in (
        ([0, 77 * SECOND // 1000], "77 ms", "26/s"),
        ([0, 3 * 60 * SECOND], "3 min", "0.667/min"),
        ([0, hour + 62 * SECOND], "1 h 1 min", "1.97/h"),
        ([0, 65 * SECOND], "1 min 5 s", "1.85/min"),
        ([0, 1000, 2000], "1 µs", "1,500,000/s"),
    ):
        assert {gap, f"a (inbound): at most {rate}"} <= drawn(times, [])


@pytest.mark.tools
def test_a_picture_of_a_single_notification() -> None:
    found = drawn([SECOND + 123], [])
    assert {"a (inbound): 1", "rates: too few notifications"} <= found
    assert any(text.endswith(":01.000000123") for text in found)


@pytest.mark.tools
def test_close_marks_share_a_flag_and_each_has_a_line_in_the_list() -> None:
    long = "the proxy was started again " * 12
    marks = [Mark(SECOND, "down"), Mark(SECOND + 1, "up"), Mark(50 * SECOND, long)]
    found = drawn([0, 100 * SECOND], marks)
    assert {"1-2", "3", "down", "up", "mark (listed below the rates)"} <= found
    assert " ".join(sorted(text for text in found if "proxy" in text)).count("the proxy was started") >= 10


@pytest.mark.tools
def test_a_picture_on_standard_output(night: Path) -> None:
    done = plot(night, "--out", "-")
    assert (done.returncode, done.stderr) == (0, "")
    ET.fromstring(done.stdout)  # noqa: S314 - of our own making
    assert f"{OUT} (outbound): 3" in texts(done.stdout)
    assert not night.with_suffix(".svg").exists()


@pytest.mark.tools
def test_another_format_and_place(night: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.png"
    assert plot(night, "--out", out, "--json").returncode == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    done = plot(night, "--out", tmp_path / "nowhere/p.svg")
    assert (done.returncode, done.stdout) == (71, "")
    assert done.stderr == f"inco-trio: error: {tmp_path}/nowhere/p.svg: cannot be written: No such file or directory\n"


def record(path: Path, names: Sequence[str], marks: Sequence[str] = ()) -> Path:
    """Write a recording of inbound notifications with these names, 1 ms apart, followed by marks."""
    recorder = Recorder(path)
    for number, name in enumerate(names):
        recorder.append(number * 10**6, Direction.INBOUND, name, "", encode(name.encode(), MAC), "rpmsg4000")
    for number, text in enumerate(marks, len(names)):
        recorder.mark(number * 10**6, text)
    recorder.close()
    return path


def comments(picture: Path) -> set[str]:
    """Return the comments in an SVG; matplotlib draws text as paths and puts the original text into comments."""
    ET.parse(picture)  # noqa: S314 - of our own making
    return texts(picture.read_text())


def texts(svg: str) -> set[str]:
    return {part.partition("-->")[0].strip() for part in svg.split("<!--")[1:]}


@pytest.mark.tools
def test_signal_names_are_drawn_literally(tmp_path: Path) -> None:
    formula = r"a$\frac$b"
    path = record(tmp_path / "x$^{$.pcapng", [formula, "_hidden", IN], [r"$\frac$", "bell\a, escape\x1b, half \ud800"])
    done = plot(path)
    assert (done.returncode, done.stderr) == (0, "")
    said = comments(path.with_suffix(".svg"))
    assert {f"{formula} (inbound): 1", "x$^{$.pcapng: 3 notifications", r"$\frac$"} <= said
    assert r"bell\x07, escape\x1b, half \ud800" in said
    assert {"_hidden (inbound): 1", "_hidden (inbound): at most 250/s"} <= said


@pytest.mark.tools
def test_only_the_most_frequent_of_many_signals_are_drawn(tmp_path: Path) -> None:
    names = [f"signal{number}" for number in range(300)]
    path = record(tmp_path / "f.pcapng", [*names, "signal299"], ["the link went down"] * 3000)
    assert plot(path).returncode == 0
    picture = path.with_suffix(".svg")
    said = comments(picture)
    assert "signal299 (inbound): 2" in said
    assert "signal150 (inbound): 1" not in said
    assert "notifications, and the longest gap of each signal: the 40 most frequent of 300" in said
    assert picture.stat().st_size < 2 << 20


@pytest.mark.tools
def test_a_pair_without_an_answer_is_drawn(tmp_path: Path) -> None:
    path = record(tmp_path / "f.pcapng", [IN, OUT])
    assert plot(path, "--pair", OUT, IN).returncode == 0
    assert f"from {OUT} to {IN}: 0 answered, 1 not" in comments(path.with_suffix(".svg"))


@pytest.mark.tools
def test_very_different_response_times_use_a_logarithmic_axis(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f.pcapng")
    for number in range(10):
        for direction, name, late in ((Direction.OUTBOUND, OUT, 0), (Direction.INBOUND, IN, 3**number * 100_000)):
            recorder.append(number * 10 * SECOND + late, direction, name, "", encode(name.encode(), MAC), "rpmsg4000")
    recorder.close()
    assert plot(tmp_path / "f.pcapng", "--pair", OUT, IN).returncode == 0
    said = comments(tmp_path / "f.svg")
    assert {"1 ms", "10 ms", "100 ms", "1 s"} <= said
    assert [each for each in said if "$" in each] == []


def test_the_picture_never_replaces_the_recording(tmp_path: Path) -> None:
    path = record(tmp_path / "f.svg", [IN])
    (tmp_path / "link.svg").symlink_to(path)
    before = path.read_bytes()
    for words, out in (((path,), path), ((path, "--out", tmp_path / "link.svg"), tmp_path / "link.svg")):
        done = plot(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"inco-trio: error: --out {out}: is the recording itself (use another file)\n"
    assert path.read_bytes() == before


@pytest.mark.parametrize("directory", [".", "/", ".."])
def test_a_directory_is_not_accepted_as_a_recording(directory: str) -> None:
    done = plot(directory)
    said = f"inco-trio: error: {directory}: not a recording: not a regular file\n"
    assert (done.returncode, done.stderr) == (65, said)


@pytest.mark.parametrize("marks", [False, True])
def test_an_impossible_timestamp_is_an_error(tmp_path: Path, marks: bool) -> None:
    path, recorder = tmp_path / "f", Recorder(tmp_path / "f")
    if marks:
        recorder.mark(2**63, "x")
    else:
        recorder.append(2**63, Direction.INBOUND, IN, "", encode(IN.encode(), MAC), "rpmsg4000")
    recorder.close()
    done = plot(path, "--json")
    said = f"inco-trio: error: {path}: damaged: packet 1 is from 2262 or later, or from before 1970\n"
    assert (done.returncode, done.stdout, done.stderr) == (65, "", said)


def test_percentiles_of_more_values_than_are_sorted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.capture.summary.AT_ONCE", 7)
    values = [each * 37 % 101 * SECOND for each in range(101)]
    assert spread(values) == {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert spread([-SECOND, 2**63 - 1, -(2**63)]) == {
        "min": -(2**63) / SECOND,
        "p50": -1,
        "p90": (2**63 - 1) / SECOND,
        "p99": (2**63 - 1) / SECOND,
        "max": (2**63 - 1) / SECOND,
    }
    assert spread([]) is None


@pytest.mark.tools
@pytest.mark.thorough
def test_a_million_notifications_take_little_memory() -> None:
    # Limit the memory growth after the imports and a first picture. Two arrays need 16 bytes per notification (16 MiB);
    # a list of Python objects would need over 40 MiB.
    code = f"""
import resource, tempfile
from pathlib import Path
from inco_trio.capture.picture import draw
from inco_trio.capture.recording import Entry
from inco_trio.capture.summary import Pair, Summary

def peak(count):
    summary = Summary([Pair("a", "b")])
    for number in range(count // 2):
        summary.take(Entry(number * 10_000 + number % 97, "a", None))
        summary.take(Entry(number * 10_000 + 500 + number % 89, "b", None))
    with tempfile.TemporaryDirectory() as home:
        summary.numbers()
        Path(home, "f.svg").write_bytes(draw(summary, "", ".svg"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak({10**4})
print(peak({10**6}) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=False)
    assert done.stderr == ""
    assert float(done.stdout) < 48


@pytest.mark.tools
def test_a_picture_with_many_notifications_is_small(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f.pcapng")
    frame = encode(IN.encode(), MAC)
    for number in range(20_000):
        recorder.append(number * 1000, Direction.INBOUND, IN, "", frame, "rpmsg4000")
    recorder.close()
    assert plot(tmp_path / "f.pcapng").returncode == 0
    assert (tmp_path / "f.svg").stat().st_size < 1 << 20


@pytest.mark.tools
def test_ignored_frames_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "f.pcapng"
    recorder = Recorder(path)
    recorder.append(0, Direction.INBOUND, IN, "", encode(IN.encode(), MAC), "rpmsg4000")
    for _ in range(3):
        recorder.ignored(SECOND, "ignored: unknown signal x", encode(b"x", MAC), "rpmsg4000")
    recorder.close()
    done = plot(path)
    assert done.stdout == f"1 notifications and 0 marks plotted to {tmp_path}/f.svg\n"
    assert done.stderr == f"inco-trio: {path}: 3 frames that the proxy ignored are not plotted\n"


@pytest.mark.tools
@pytest.mark.tools
def test_a_long_mark_is_shortened(tmp_path: Path) -> None:
    from inco_trio.capture.picture import _flags, _listed

    for text in ("x" * 2**20, "x " * 2**19, "\0" * 2**20):
        summary = Summary(marks=[Mark(0, text)] * 30)
        lines = _listed(summary, _flags(summary.marks, 0, 1.0))
        assert len(lines) == 20 * 4 + 1
        assert lines[3][1].endswith("…")
        assert max(len(line) for _, line in lines) <= 130


@pytest.mark.tools
def test_characters_that_the_font_lacks_cause_no_warnings(night: Path) -> None:
    recorder = Recorder(night)
    recorder.mark(0, "".join(map(chr, range(0x4E00, 0x4E40))))
    recorder.close()
    done = plot(night)
    assert (done.returncode, done.stderr) == (0, "")


def _grow(recorder: Recorder, kind: str) -> None:
    name, mac = ("a", MAC)
    for number in range(200):
        board = f"b{number}" if kind == "boards" else "x"
        name = f"s{number}" if kind == "signals" else "a"
        mac = number.to_bytes(6) if kind == "senders" else MAC
        frame = encode(name.encode(), mac) if kind in ("senders", "interfaces") else None
        link = f"eth{number}" if kind == "interfaces" else board
        count = 1000 if kind == "notifications" else 1
        if kind == "marks":
            recorder.mark(number, "x" * 100)
        else:
            recorder.append(number, Direction.INBOUND, name, "", frame, link, count=count)


@pytest.mark.parametrize("kind", ["boards", "interfaces", "marks", "notifications", "senders", "signals"])
def test_a_recording_that_needs_too_much_memory_is_an_error(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inco_trio.capture.pcapng.MEMORY_MAX", 50_000)
    recorder = Recorder(tmp_path / "f")
    _grow(recorder, kind)
    recorder.close()
    with pytest.raises(RecordingError, match="needs more than 0 MiB of memory"):
        _read(tmp_path / "f", SignalTable(()), [])
    monkeypatch.undo()
    _read(tmp_path / "f", SignalTable(()), [])


def test_interfaces_without_packets_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inco_trio.capture.pcapng.MEMORY_MAX", 50_000)
    (tmp_path / "f").write_bytes(section_block("x") + 200 * interface_block("eth0"))
    with pytest.raises(RecordingError, match="needs more than 0 MiB of memory"):
        _read(tmp_path / "f", SignalTable(()), [])


def test_standard_input_that_does_not_block_is_read_to_the_end(night: Path) -> None:
    """A pipe in this mode looks as if it had ended whenever it is empty."""
    with night.open("rb") as file:
        os.set_blocking(file.fileno(), False)
        done = subprocess.run([*COMMAND, "plot", "-", "--json"], stdin=file, stdout=subprocess.DEVNULL, timeout=HANG)
        assert (done.returncode, os.get_blocking(file.fileno())) == (0, True)


def test_a_failed_picture_leaves_no_file(night: Path) -> None:
    command = ["prlimit", "--fsize=100", sys.executable, "-m", "inco_trio", "plot", str(night)]
    # Turn off the coverage tool: its data file would also exceed the file size limit.
    env = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}
    # Under this limit, Python would leave truncated .pyc files, which it cannot import later.
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False, env=env)
    picture = night.with_suffix(".svg")
    assert done.stderr == f"inco-trio: error: {picture}: cannot be written: File too large\n"
    assert done.returncode == 71
    assert not picture.exists()


def test_a_missing_matplotlib_is_an_error(night: Path) -> None:
    hidden = "import sys; sys.modules['matplotlib'] = None"
    done = plot(night, code=hidden)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.startswith("inco-trio: error: matplotlib is not installed (")
    assert done.stderr.endswith("): pip install 'inco-trio[plot]', or use --json\n")
    assert plot(night, "--json", code=hidden).returncode == 0


def test_a_truncated_recording_is_plotted_with_a_warning(night: Path) -> None:
    night.write_bytes(night.read_bytes()[:-3])
    done = plot(night, "--json")
    assert done.returncode == 0
    assert done.stderr.startswith(f"inco-trio: {night}: ")
    assert done.stderr.endswith(": only the packets before this position are plotted\n")
    assert json.loads(done.stdout)["marks"] == []


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (
            ("FILE", "--pair", OUT, "nobody", "--json"),
            2,
            f"--pair: 'nobody' is not in FILE (expected one of: {IN}, {OUT})",
        ),
        (("FILE", "--out", "x.pdf"), 2, "--out x.pdf: unknown format (expected one of .svg, .png)"),
        (("FILE", "--out", ""), 2, "--out: the path is empty"),
        (("FILE", "--out", "-", "--json"), 2, "--out -: cannot be used with --json (write the plot to a file)"),
        (("/nowhere", "--json"), 65, "/nowhere: cannot be read: No such file or directory"),
    ],
)
def test_invalid_arguments_are_refused(night: Path, words: tuple[str, ...], code: int, text: str) -> None:
    done = plot(*(word.replace("FILE", str(night)) for word in words))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"inco-trio: error: {text.replace('FILE', str(night))}\n"


def test_an_empty_recording_is_an_error(tmp_path: Path) -> None:
    Recorder(tmp_path / "f").close()
    done = plot(tmp_path / "f", "--json")
    assert (done.returncode, done.stderr) == (65, f"inco-trio: error: {tmp_path}/f: contains no notifications\n")


def on_a_terminal(path: Path, end: bytes) -> tuple[int, str, bytes]:
    """Plot with progress. Return the exit code, the standard output, and what the terminal shows until `end`."""
    code = "import inco_trio.cli.plot as plot; plot.SHOWN = -1.0; plot.OFTEN = 1"
    start = f"{code}\nfrom inco_trio.cli import main; import sys; sys.exit(main())"
    master, slave = pty.openpty()
    command = [sys.executable, "-c", start, "plot", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True) as process:
        os.close(slave)
        out, _ = process.communicate(timeout=HANG)
    shown = b""
    while end not in shown:  # The kernel delivers the output with a delay.
        shown += os.read(master, 4096)
    os.close(master)
    return process.returncode, out, shown


def test_progress_is_shown_on_a_terminal(night: Path) -> None:
    code, out, shown = on_a_terminal(night, b" %\r\x1b[K")
    assert (code, json.loads(out)["to"]) == (0, 4)
    assert shown.startswith(b"\r\x1b[K")


def test_an_error_never_continues_the_line_of_the_progress(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f")
    recorder.mark(SECOND, "the link went down")
    recorder.mark(2**63, "x")
    recorder.close()
    code, out, shown = on_a_terminal(tmp_path / "f", b"or from before 1970\r\n")
    assert (code, out) == (65, "")
    assert b" %\r\x1b[Kinco-trio: error: " in shown


def test_pending_notifications_are_counted_and_plotted(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "f")
    frame = encode(IN.encode(), MAC)
    recorder.append(SECOND, Direction.INBOUND, IN, "/r", frame, "x", pending="cannot write: Is a directory")
    recorder.append(3 * SECOND, Direction.INBOUND, IN, "/r", None, "x", delay=2.0)
    recorder.append(3 * SECOND, Direction.INBOUND, IN, "/r", None, "x", delay_max=2.5, count=3)
    recorder.append(3 * SECOND, Direction.INBOUND, IN, "/r", frame, "x", delay_max=2.5)
    recorder.append(4 * SECOND, Direction.OUTBOUND, OUT, "/r", None, "x", pending="Network is down")
    recorder.close()
    done = plot(tmp_path / "f", "--json", "--out", tmp_path / "f.svg")
    found = json.loads(done.stdout)
    assert (found["from"], found["to"]) == (1, 4)
    keys = ("count", "pending", "late", "delay", "possibly_late")
    signals = {each["signal"]: tuple(each[key] for key in keys) for each in found["signals"]}
    two = dict.fromkeys(("min", "p50", "p90", "p99", "max"), 2)
    assert signals == {IN: (5, 0, 1, two, 4), OUT: (0, 1, 0, None, 0)}
    labels = {f"{IN} (inbound): 5, 1 of them late, 4 possibly late", f"{OUT} (outbound): 0, 1 pending"}
    assert labels | {"became pending", "pending"} <= comments(tmp_path / "f.svg")


def test_notifications_are_pending_until_the_recording_ends_if_they_are_not_delivered() -> None:
    """The proxy remembers fewer distinct times than notifications, so the number of deliveries must decide."""
    flow = Flow("a", None)
    for second in range(100):
        flow.take(Entry(second * SECOND, "a", None, pending="Is a directory"))
    assert len(flow.unfinished()) == 100
    for second in range(98):
        # Of every second notification, the proxy knows only the longest possible delay.
        delays = (0.0, 201.0 - second) if second % 2 else (200.0 - second, 0.0)
        flow.take(Entry(200 * SECOND, "a", None, "", False, "", *delays))
    assert list(flow.unfinished()) == [98 * SECOND, 99 * SECOND]
    assert flow.waits(300 * SECOND) == [(0, 300 * SECOND)]
    # An earlier process may have recorded when these two became pending; its successor does not know the times.
    flow.take(Entry(250 * SECOND, "a", None))
    assert list(flow.unfinished()) == []
    # This notification became pending before the recording began.
    flow.take(Entry(251 * SECOND, "a", None, delay=1.0))
    flow.take(Entry(252 * SECOND, "a", None, pending="Is a directory"))
    assert list(flow.unfinished()) == [252 * SECOND]
    assert flow.waits(300 * SECOND)[-1] == (252 * SECOND, 300 * SECOND)


def test_boards_are_plotted_separately(tmp_path: Path) -> None:
    """A board that is silent must not be hidden by another board with the same signals."""
    recorder = Recorder(tmp_path / "f")
    for number in range(4):
        for board in ("b1", "b2") if number < 2 else ("b1",):
            recorder.append(2 * number * SECOND, Direction.OUTBOUND, OUT, "", encode(OUT.encode(), MAC), board)
            frame = None if number else encode(IN.encode(), MAC)
            recorder.append((2 * number + 1) * SECOND, Direction.INBOUND, IN, "", frame, board)
    recorder.close()
    done = plot(tmp_path / "f", "--json", "--out", tmp_path / "f.svg", "--pair", OUT, IN)
    found = json.loads(done.stdout)
    counts = {(each["board"], each["signal"]): each["count"] for each in found["signals"]}
    assert counts == {("b1", OUT): 4, ("b1", IN): 4, ("b2", OUT): 2, ("b2", IN): 2}
    (pair,) = found["pairs"]
    assert (pair["answered"], pair["unanswered"], pair["taken"]["max"]) == (6, 0, 1)
    assert {f"b1: {IN} (inbound): 4", f"b2: {IN} (inbound): 2"} <= comments(tmp_path / "f.svg")


def test_overlapping_waits_of_a_signal_are_one_period() -> None:
    flow = Flow("a", None)
    for late, delay in ((9, 2), (4, 3), (5, 3), (5, 4)):
        flow.late.append(late)
        flow.delays.append(delay)
    assert flow.waits(20) == [(1, 5), (7, 9)]
    assert flow.waits(20, 1) == [(1, 5), (7, 9)]
    assert flow.waits(20, 2) == [(1, 9)]
