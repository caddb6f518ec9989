"""Tests with unusual input: each command prints one line for an error and exits with the right code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from inco_trio.simulation.world import Cores, Peer
from netns.fixtures import StartProxy
from netns.hang import HANG
from tests.support_proxy import trigger, write_udrv

SAMPLE = str(Path(__file__).parent / "data" / "udrv.json")
RUN = [sys.executable, "-m", "inco_trio"]
LOGGED = re.compile(rb"([-0-9]+ [:.0-9]+ )?inco-trio: info: ")

Done = tuple[int, bytes, bytes]


def finished(command: Iterable[object], cwd: Path | None = None, **environment: str) -> Done:
    """Run a command and return its exit code, standard output and standard error."""
    done = subprocess.run(
        [word if isinstance(word, bytes) else str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=HANG,
        cwd=cwd,
        env={**os.environ, "UDRV_JSON_PATH": "", **environment},
    )
    return done.returncode, done.stdout, done.stderr


def complaint(text: str) -> bytes:
    return b"inco-trio: error: " + text.encode() + b"\n"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (b"", "''"),
        (b"sixteen-letters-", "'sixteen-letters-'"),
        ("ü".encode() * 8, "'üüüüüüüü'"),
        (b"a/b", "'a/b'"),
        (b"a b", "'a b'"),
        (b"a:1", "'a:1'"),
        (b"a\n", "'a\\n'"),
        (b"..", "'..'"),
        (b"\xff", "'\\udcff'"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "command",
    [
        [*RUN, "run", "--irq-dir", "irq", "--"],
        [*RUN, "run", "--irq-dir", "irq", "--wait-link", "--log-format", "json", "--"],
        [Path(sys.executable).with_name("inco_proxy"), "--"],
        [*RUN, "doctor", "--irq-dir", "irq", "--"],
        [*RUN, "s6", "scan", "--user", "root", "--config", SAMPLE, "--iface"],
        [*RUN, "s6", "--systemd", "--config", SAMPLE, "--iface"],
    ],
    ids=["run", "wait", "inco_proxy", "doctor", "s6", "systemd"],
)
def test_every_command_checks_links_in_the_same_way(
    command: list[object], address: bytes, shown: str, tmp_path: Path
) -> None:
    # Pass the option and its value as one argument, because the value can begin with a dash.
    command = [*command[:-1], b"--iface=" + address] if command[-1] == "--iface" else [*command, address]
    assert finished(command, cwd=tmp_path, UDRV_JSON_PATH=SAMPLE) == (
        2,
        b"",
        complaint(
            f"link {shown}: expected unix:LOCAL,peer=REMOTE or an interface name (1 to 15 bytes of UTF-8 without "
            "'/', ':' or whitespace)"
        ),
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["run", "none0", "--irq-dir", ""], "--irq-dir"),
        (["run", "none0", "--config", ""], "--config"),
        (["run", "none0", "--irq-dir", "irq", "--fd-holder", ""], "--fd-holder"),
        (["check", "--config", ""], "--config"),
        (["doctor", "--config", ""], "--config"),
        (["doctor", "--irq-dir", ""], "--irq-dir"),
        (["doctor", "--boards", ""], "--boards"),
        (["s6", "scan", "--config", ""], "--config"),
        (["s6", "--systemd", "--config", ""], "--config"),
        (["s6", "", "--config", SAMPLE], "SCANDIR"),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_refused(words: list[str], option: str, tmp_path: Path) -> None:
    assert finished([*RUN, *words], cwd=tmp_path) == (2, b"", complaint(f"{option}: the path is empty"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["check", "--config", "u.json"], 78, "u.json: cannot be read: No such file or directory"),
        (["check"], 78, "v.json: cannot be read: No such file or directory"),
        (["run", "none0", "--config", "u.json"], 78, "u.json: cannot be read: No such file or directory"),
        (
            ["run", "none0", "--irq-dir", "irq"],
            2,
            "--irq-dir irq: the working directory was removed (use an absolute path)",
        ),
        (
            ["s6", "scan", "--user", "root", "--config", SAMPLE],
            2,
            "SCANDIR scan: the working directory was removed (use an absolute path)",
        ),
        (["s6", "/x", "--config", "u"], 2, "--config u: the working directory was removed (use an absolute path)"),
        (["s6", "--systemd"], 2, "--config v.json: the working directory was removed (use an absolute path)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_relative_paths_in_a_removed_directory_are_errors(
    words: list[str], code: int, said: str, tmp_path: Path
) -> None:
    command = [Path(sys.executable).with_name("inco-trio"), *words]
    done = finished(["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *command], cwd=tmp_path, UDRV_JSON_PATH="v.json")
    assert done == (code, b"", complaint(said))


def test_absolute_paths_work_in_a_removed_directory(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    leave = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh"]
    program = Path(sys.executable).with_name("inco-trio")
    for words in (["check", "--config", SAMPLE], ["s6", tmp_path / "scan", "--user", "root", "--config", SAMPLE]):
        (tmp_path / "gone").mkdir(exist_ok=True)
        code, out, err = finished([*leave, program, *words], cwd=tmp_path / "gone")
        assert (code, err) == (0, b"")
        assert out


@pytest.mark.parametrize("place", ["option", "environment"])
def test_a_configuration_name_that_is_not_utf8_works(place: str, tmp_path: Path) -> None:
    name = os.fsencode(write_udrv(tmp_path / "\udcff.json", tmp_path))
    words = ["--config", name] if place == "option" else []
    code, out, err = finished([*RUN, "check", *words], UDRV_JSON_PATH=os.fsdecode(name))
    assert (code, err) == (0, b"")
    assert b"redun_notify_irq" in out
    code, out, err = finished([*RUN, "s6", "--systemd", *words], UDRV_JSON_PATH=os.fsdecode(name))
    assert (code, err) == (0, b"")
    assert b"/\\xff.json" in out


def test_check_escapes_terminal_controls(tmp_path: Path) -> None:
    (tmp_path / "u.json").write_text('{"file": {"ihub-irq-dev": {"path": "/run/a\\nb\\u001b[2J\\u009b"}}}')
    code, out, _ = finished([*RUN, "check", "--config", tmp_path / "u.json"])
    first = out.decode().splitlines()[0]
    assert (code, first) == (0, "ihub_reset_irq    inbound   /run/a\\nb\\x1b[2J\\x9b/message_4_state")
    boards = tmp_path / "boards"
    boards.mkdir()
    (boards / "x\ninco-trio: error: \x1b[2J.json").touch()
    code, _, err = finished([*RUN, "check", "--boards", boards])
    (line,) = err.decode().splitlines()
    assert (code, line.partition(": a board's name")[0]) == (
        78,
        f"inco-trio: error: {boards}/x\\ninco-trio: error: \\x1b[2J.json",
    )


def test_a_large_signal_table_takes_linear_time(tmp_path: Path) -> None:
    """A quadratic algorithm would take minutes for this table."""
    signals = {f"s{n}": {"direction": "inbound", "reg": f"ihub-irq-dev.r{n}"} for n in range(60_000)}
    udrv = {"file": {"ihub-irq-dev": {"path": "/run/irq"}}, "misc": {"inco_proxy": {"signals": signals}}}
    (tmp_path / "u.json").write_text(json.dumps(udrv))
    code, out, _ = finished([*RUN, "check", "--config", tmp_path / "u.json"])
    assert (code, out.count(b"\n")) == (0, 60_006)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"signal": {}}', "misc.inco_proxy.signal: unknown key (expected signals)"),
        ('{"signals": {}, "signals": {}}', "misc.inco_proxy.signals: given more than once"),
        (
            '{"signals": {"a": {}, "a": {"direction": "inbound", "reg": "ihub-irq-dev.a"}}}',
            "misc.inco_proxy.signals.a: given more than once",
        ),
        (
            '{"signals": {"a": {"direction": "inbound", "reg": "ihub-irq-dev.a", "reg": "ihub-irq-dev.b"}}}',
            "misc.inco_proxy.signals.a.reg: given more than once",
        ),
        (
            '{"signals": {"a": {"direction": "inbound", "reg": "ihub-irq-dev.a", "register": "b"}}}',
            "misc.inco_proxy.signals.a.register: unknown key (expected one of direction, reg)",
        ),
    ],
    ids=["signal", "signals twice", "a name twice", "a reg twice", "an unknown key"],
)
def test_typing_errors_in_the_signal_table_are_refused(text: str, said: str, tmp_path: Path) -> None:
    udrv = tmp_path / "u.json"
    udrv.write_text('{"file": {"ihub-irq-dev": {"path": "/irq"}}, "misc": {"inco_proxy": %s}}' % text)  # noqa: UP031
    for words in (["check"], ["run", "none0"]):
        code, out, err = finished([*RUN, *words, "--config", str(udrv)])
        assert (code, out) == (78, b"")
        assert err == complaint(f"{udrv}: {said}")


def scan(directory: Path, *words: str) -> Done:
    code, out, err = finished(
        [
            *RUN,
            "s6",
            str(directory),
            *([] if "--user" in words else ["--user", "root"]),
            "--iface",
            "core0",
            "--config",
            SAMPLE,
            *words,
        ]
    )
    return code, out.replace(b"%b/" % os.fsencode(directory), b""), err.replace(b"%b/" % os.fsencode(directory), b"")


PASSED_OVER = (
    b"warning: inco-trio-x/data/uid: not written by `inco-trio service s6`, so its service may not use the fd store\n"
)


@pytest.mark.parametrize(
    ("make", "out"),
    [
        (lambda path: path.write_bytes(b"\xff\xfe"), PASSED_OVER),
        (lambda path: path.write_text("12345678901"), PASSED_OVER),
        (os.mkfifo, PASSED_OVER),
        (Path.mkdir, PASSED_OVER),
        (lambda path: path.symlink_to("uid"), PASSED_OVER),
        (lambda path: path.symlink_to("nowhere"), PASSED_OVER),
        (lambda path: path.symlink_to("/dev/zero"), PASSED_OVER),
        (Path.touch, b"nothing changed\n"),
        (lambda path: path.parent.rmdir(), b"nothing changed\n"),
        (lambda path: (path.parent.rmdir(), path.parent.touch()), b"nothing changed\n"),
    ],
    ids=["binary", "long", "FIFO", "directory", "loop", "dangling", "device", "empty", "no data", "data is a file"],
)
def test_a_service_not_written_by_us_gets_no_rights(make: Callable[[Path], object], out: bytes, tmp_path: Path) -> None:
    scan(tmp_path)
    (tmp_path / "inco-trio-x" / "data").mkdir(parents=True)
    make(tmp_path / "inco-trio-x" / "data" / "uid")
    assert scan(tmp_path) == (0, out, b"")


def test_a_service_whose_name_has_a_line_break_gets_no_rights(tmp_path: Path) -> None:
    scan(tmp_path)
    (tmp_path / "inco-trio-x\n" / "data").mkdir(parents=True)
    (tmp_path / "inco-trio-x\n" / "data" / "uid").write_text("5")
    assert scan(tmp_path) == (0, PASSED_OVER.replace(b"-x/", rb"-x\n/"), b"")
    assert not (tmp_path / "inco-trio-fdholder/data/rules/uid/5").exists()


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (Path.mkdir, 2, "inco-trio: error: cannot write inco-trio-core0/run: Is a directory\n"),
        (os.mkfifo, 0, "created inco-trio-core0/run\n"),
        (lambda path: path.symlink_to("/nonexistent/x"), 0, "created inco-trio-core0/run\n"),
        (lambda path: path.symlink_to("run"), 0, "created inco-trio-core0/run\n"),
        (lambda path: path.symlink_to("finish"), 0, "created inco-trio-core0/run\n"),
    ],
    ids=["directory", "FIFO", "dangling", "loop", "symlink"],
)
def test_a_run_file_of_another_type_is_replaced_or_refused(
    make: Callable[[Path], object], code: int, said: str, tmp_path: Path
) -> None:
    scan(tmp_path)
    path = tmp_path / "inco-trio-core0/run"
    path.unlink()
    make(path)
    before = (path.parent / "finish").read_bytes()
    done, out, err = scan(tmp_path)
    assert (done, (out + err).decode()) == (code, said)
    assert (path.parent / "finish").read_bytes() == before
    if code == 0:
        assert not path.is_symlink()
        assert path.read_text().startswith("#!/bin/sh\n")


@pytest.mark.parametrize("place", ["inco-trio-core0", "inco-trio-fdholder/data/rules/uid"])
@pytest.mark.parametrize(
    ("target", "reason"),
    [(None, "Not a directory"), ("nowhere", "File exists"), ("nowhere/x", "File exists"), ("chain", "File exists")],
    ids=["file", "dangling", "two missing", "chain"],
)
def test_a_file_in_the_place_of_a_directory_is_an_error(
    place: str, target: str | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if target is None:
        path.touch()
    else:
        path.symlink_to(target)
        (path.parent / "chain").symlink_to("nowhere")
    code, _, err = scan(tmp_path)
    assert (code, err) == (2, complaint(f"cannot write {place}: {reason}"))
    assert not (path.parent / "nowhere").exists()


def test_a_directory_is_created_below_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "inco-trio-core0").symlink_to("elsewhere")
    assert scan(tmp_path)[0] == 0
    assert (tmp_path / "elsewhere/log/run").exists()


def test_only_our_own_access_rules_are_removed(tmp_path: Path) -> None:
    scan(tmp_path)
    uids = tmp_path / "inco-trio-fdholder/data/rules/uid"
    (uids / "notes").touch()
    (uids / "98765").mkdir()
    (uids / "98765/foreign").touch()
    (uids / "link").symlink_to("98765")
    removed = b"removed inco-trio-fdholder/data/rules/uid/98765\nremoved inco-trio-fdholder/data/rules/uid/link\n"
    assert scan(tmp_path) == (0, removed, b"")
    assert sorted(path.name for path in uids.iterdir()) == sorted({"0", str(os.geteuid()), "notes"})


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("unix:/run/core 1/local,peer=/run/remote", 0, b""),
        (
            "unix:/a\nb,peer=/c",
            2,
            complaint("link 'unix:/a\\nb,peer=/c': contains a line break (invalid in the name of a service)"),
        ),
        (
            "unix:/fdholder,peer=/c",
            2,
            complaint("link 'unix:/fdholder,peer=/c': the name inco-trio-fdholder is reserved for the fd store"),
        ),
    ],
    ids=["spaces", "line break", "the holder's"],
)
def test_the_service_of_a_socket_is_named_after_its_path(address: str, code: int, said: bytes, tmp_path: Path) -> None:
    done = finished([*RUN, "s6", str(tmp_path), "--iface", address, "--config", SAMPLE, "--user", "nobody"])
    assert (done[0], done[2]) == (code, said)
    if code == 0:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["inco-trio-fdholder", "inco-trio-run-core 1-local"]
        assert f"run '{address}' --config" in (tmp_path / "inco-trio-run-core 1-local/run").read_text()
        (rule,) = tmp_path.glob("inco-trio-fdholder/data/rules/uid/6*/env/S6_FDHOLDER_STORE_REGEX")
        assert rule.read_text() == "^inco-trio/(run-core 1-local)/\n"
        unit = finished([*RUN, "s6", "--systemd", "--iface", address, "--config", SAMPLE])[1].decode()
        assert unit.startswith("# /etc/systemd/system/inco-trio-run-core 1-local.service, ")


def mounted(options: str, script: str, tmp_path: Path, *words: str | Path) -> Done:
    """Run `script` with the arguments `words` in a mount namespace where the directory m is a tmpfs with `options`."""
    (tmp_path / "m").mkdir(exist_ok=True)
    setup = f"mount -t tmpfs -o {options} inco-trio-test m && {script}"
    return finished(["unshare", "--mount", "sh", "-c", setup, "sh", *words], cwd=tmp_path)


IN_M = [*RUN, "s6", "m/scan", "--user", "root", "--iface", "core0", "--config", SAMPLE]


@pytest.mark.netns
@pytest.mark.parametrize("options", ["size=4k", "size=20k", "nr_inodes=2", "nr_inodes=9"])
def test_a_scan_directory_on_a_full_disk_is_one_error(options: str, tmp_path: Path) -> None:
    code, out, err = mounted(options, '"$@"; code=$?; find m -name ".*.new"; exit $code', tmp_path, *IN_M)
    assert (code, out) == (71, b"")
    assert err.startswith(b"inco-trio: error: cannot write %b/m/scan/" % os.fsencode(tmp_path))
    assert err.endswith(b": No space left on device\n")
    assert err.count(b"\n") == 1


@pytest.mark.netns
def test_a_scan_directory_on_a_read_only_file_system(tmp_path: Path) -> None:
    written = '"$@" >written && mount -o remount,ro m && "$@"'
    assert mounted("mode=755", written, tmp_path, *IN_M) == (0, b"nothing changed\n", b"")
    changed = written + " --config /dev/null"
    assert mounted("mode=755", changed, tmp_path, *IN_M) == (
        2,
        b"",
        complaint(f"cannot write {tmp_path}/m/scan/inco-trio-core0/run: Read-only file system"),
    )
    assert mounted("ro", '"$@"', tmp_path, *IN_M) == (
        2,
        b"",
        complaint(f"cannot write {tmp_path}/m/scan: Read-only file system"),
    )


@pytest.mark.netns
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("ro", 78, "/m/irq: Read-only file system (configure a directory that can be created and"),
        ("nr_inodes=1", 71, "/m/irq: No space left on device"),
        ("nr_inodes=3", 71, "/m/irq/message_"),
    ],
)
def test_registers_that_cannot_be_created_are_one_error(
    options: str, code: int, said: str, tmp_path: Path, cores: Cores
) -> None:
    done, _, err = cores.core0.run(
        lambda: mounted(options, '"$@"', tmp_path, *RUN, "run", cores.link, "--irq-dir", "m/irq")
    )
    lines = [line for line in err.splitlines() if not LOGGED.match(line)]
    assert (done, len(lines)) == (code, 1)
    assert lines[0].startswith(f"inco-trio: error: {tmp_path}{said}".encode())


@pytest.mark.netns
def test_an_unreadable_service_file_is_an_error(tmp_path: Path, nobody: list[str]) -> None:
    scandir = tmp_path / "scan"
    scan(scandir)
    for path in [scandir, *scandir.rglob("*")]:
        os.chown(path, 1, 1)  # netns/unprivileged.py runs programs as this user.
    (scandir / "inco-trio-x" / "data").mkdir(parents=True)
    (scandir / "inco-trio-x" / "data" / "uid").write_text("5")
    (scandir / "inco-trio-x" / "data").chmod(0)
    scandir.chmod(0o755)
    words = ["s6", str(scandir), "--user", "root", "--iface", "core0", "--config", "/dev/null"]
    command = [*nobody[:2], str(scandir), *nobody[2:], *RUN, *words]
    code, _, err = finished(command)
    assert code == 77
    assert err == complaint(f"cannot read {scandir}/inco-trio-x/data/uid: Permission denied")


WITHOUT_PROC = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs inco-trio-test /proc && exec "$@"', "sh", *RUN]


@pytest.mark.netns
def test_commands_work_without_proc(tmp_path: Path) -> None:
    for words in (["check"], ["s6", "--systemd"], ["s6", str(tmp_path / "scan"), "--user", "root"]):
        code, out, err = finished([*WITHOUT_PROC, *words, "--config", SAMPLE])
        assert (code, err) == (0, b"")
        assert out
    assert finished([*WITHOUT_PROC, "demo"]) == (
        71,
        b"",
        complaint("/proc is not mounted: the demonstration needs it to create network namespaces"),
    )


@pytest.mark.netns
def test_the_daemon_works_without_proc(cores: Cores, core1: Peer, irq_dir: Path) -> None:
    ready, write_ready = os.pipe()
    with cores.core0.run(
        lambda: subprocess.Popen(
            [*WITHOUT_PROC, "run", cores.link, "--irq-dir", str(irq_dir), "--notification-fd", str(write_ready)],
            stderr=subprocess.PIPE,
            pass_fds=[write_ready],
        )
    ) as running:
        os.close(write_ready)
        assert os.read(ready, 1) == b"\n"
        os.close(ready)
        trigger(irq_dir / "message_6_trig")
        assert core1.receive()[14:] == b"redun_notify_irq"
        running.terminate()
        said = running.communicate(timeout=HANG)[1]
    assert running.returncode == 0
    assert all(LOGGED.match(line) for line in said.splitlines())
    assert b"triggered=1 sent=1 " in said


@pytest.mark.netns
@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-", "2>/dev/full"])
def test_the_daemon_works_with_closed_or_full_streams(closed: str, cores: Cores, core1: Peer, irq_dir: Path) -> None:
    ready, write_ready = os.pipe()
    words = ["run", cores.link, "--irq-dir", str(irq_dir), "--notification-fd", str(write_ready), "-v"]
    with cores.core0.run(
        lambda: subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *RUN, *words], pass_fds=[write_ready])
    ) as running:
        os.close(write_ready)
        assert os.read(ready, 1) == b"\n"
        os.close(ready)
        trigger(irq_dir / "message_6_trig")
        assert core1.receive()[14:] == b"redun_notify_irq"
        core1.send(b"ihub_reset_irq")
        # Files must not be opened with the descriptor number of a closed stream, because they would receive log lines.
        for number in range(3):
            assert os.readlink(f"/proc/{running.pid}/fd/{number}").startswith(("/dev/", "pipe:", "/tmp/"))  # noqa: PTH115, S108
        running.terminate()
        assert running.wait(HANG) == 0
    assert (irq_dir / "message_4_state").read_bytes() == b"1"
    assert (irq_dir / "message_6_trig").read_bytes() == b"1"


HOLDER = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, b"a\\xff\\x1b[2J\\nb", 0, 0, 0)
held = open(sys.argv[1], "w")
print(flush=True)
sys.stdin.read()
"""
"""A program that holds a file open and has a process name that is not UTF-8 (PR_SET_NAME, prctl(2))."""


@pytest.mark.netns
def test_the_warning_about_a_holder_escapes_a_process_name_that_is_not_utf8(
    cores: Cores, proxy: StartProxy, irq_dir: Path, tmp_path: Path
) -> None:
    irq_dir.mkdir()
    register = irq_dir / "message_6_trig"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(register)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        running = proxy("--irq-dir", irq_dir, "--log-format", "text", "--log-timestamps", "never")
        said = running.wait_log(f"process {holder.pid}")
        # The warning must be one line without terminal control characters.
        assert said == (
            f"inco-trio: warning: {register}: process {holder.pid} (a\\xff\\x1b[2J\\nb) holds the file open for "
            "writing: only closing the file causes a notification"
        )
        assert running.stop() == 0


@pytest.mark.netns
def test_an_unreadable_trigger_is_reported_as_a_read_problem(
    cores: Cores, irq_dir: Path, nobody: list[str], tmp_path: Path
) -> None:
    sockets = tmp_path / "sockets"
    for directory, mode in ((irq_dir, 0o755), (sockets, 0o777)):
        directory.mkdir()
        directory.chmod(mode)
    for name in ("message_4_state", "message_5_state", "message_6_trig"):
        (irq_dir / name).touch()
        (irq_dir / name).chmod(0o666)
    (irq_dir / "message_6_trig").chmod(0o222)
    address = f"unix:{sockets}/a,peer={sockets}/b"
    command = [*nobody[:2], str(irq_dir), str(sockets), *nobody[2:], *RUN, "run", address, "--irq-dir", str(irq_dir)]
    command += ["--log-timestamps", "never", "--control", "none"]
    code, _, err = finished(command)
    (line,) = [line for line in err.decode().splitlines() if not line.startswith("inco-trio: info: ")]
    assert code == 77
    assert line.startswith(f"inco-trio: error: {irq_dir}/message_6_trig: Permission denied: uid ")
    assert "must be able to read triggers" in line


@pytest.mark.netns
def test_a_directory_that_the_proxy_may_not_create_is_named(cores: Cores, tmp_path: Path, nobody: list[str]) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    sockets.chmod(0o777)
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o755)
    address, directory = f"unix:{sockets}/a,peer={sockets}/b", closed / "irq"
    command = [*nobody[:2], str(closed), str(sockets), *nobody[2:], *RUN, "run", address, "--irq-dir", str(directory)]
    code, _, err = finished([*command, "--log-timestamps", "never", "--control", "none"])
    assert code == 77
    found = re.search(rf"{directory}: Permission denied: uid (\d+) may not create {directory} ", err.decode())
    assert found, err
    assert f"(run as root at each boot: install -d -o {found[1]} -g " in err.decode()
