"""Tests of the doctor's checks of services: with a real s6, and with a stand-in for systemctl."""

from __future__ import annotations

import json
import os
import pwd
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from inco_trio.cli import main
from inco_trio.doctor import services, survey
from inco_trio.doctor.result import Result, fail, warn
from inco_trio.doctor.services import FoundService, find_services, services_of
from inco_trio.links.address import parse_address
from inco_trio.linux.processes import Process, Processes, look, working_directory
from netns.fixtures import Proxy
from netns.hang import HANG
from tests.core1 import Here
from tests.faults.processes import wait_stopped
from tests.faults.supervised import Service, main_process, wait_path, write_scandir
from tests.support_doctor import BOOTED, Tree, be_patient, process
from tests.support_proxy import write_udrv

NONE = Processes((), unseen=False, mounted=True)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch.setattr)


def write_service(scandir: Path, label: str, run: str, finish: str = "exit 0") -> Path:
    directory = scandir / f"inco-trio-{label}"
    directory.mkdir(parents=True)
    for name, script in (("run", run), ("finish", finish)):
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    return directory


def found_in(scandir: Path, label: str | None = None) -> list[Result]:
    """Return the results for the services in one scan directory. Other tests may run other services."""
    found = find_services(look())
    chosen = found if label is None else services_of(label, found)
    results = (result for service in chosen for result in service.results)
    return [result for result in results if result.subject.startswith(f"{scandir}/")]


def replace_services(monkeypatch: pytest.MonkeyPatch, *found: FoundService) -> None:
    """Let the doctor find these services."""
    # `survey` must not be imported first while the function is replaced: it would keep the replacement.
    for module in (survey, services):
        monkeypatch.setattr(module, "find_services", lambda *_: [*found])


def run_fix(result: Result) -> None:
    assert result.fix is not None
    subprocess.run(["sh", "-ec", result.fix], check=True, timeout=HANG)


def pid_of(service: Path) -> int:
    """Return the PID of a service's s6-supervise."""
    (found,) = (
        each.pid for each in look().all if each.name == "s6-supervise" and working_directory(each.pid) == service
    )
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process while the block runs."""
    wait_stopped(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def svstat(service: Path, field: str) -> str:
    return subprocess.check_output(["s6-svstat", "-o", field, str(service)], text=True).strip()


def wait_state(service: Path, field: str, value: str) -> None:
    """Wait until s6-svstat reports a value."""
    status = service / "supervise/status"
    wait_path(status, lambda: status.exists() and svstat(service, field) == value)


@pytest.mark.s6
def test_a_service_that_is_down_is_reported_with_its_reason_and_its_log(tmp_path: Path) -> None:
    refused = write_service(tmp_path, "refused", "exit 78", "exit 125")
    stopped = write_service(tmp_path, "stopped", "exec sleep infinity")
    (stopped / "down").touch()
    with Service(Here(), tmp_path, "refused") as service:  # type: ignore[arg-type]
        wait_path(stopped / "supervise/status")
        # The service is down before its first start, too. Wait until s6-supervise does not want it up.
        wait_state(refused, "wantedup", "false")
        first, second = found_in(tmp_path)
        assert found_in(tmp_path, "stopped") == [second]
        assert (first.level.name, first.subject, first.fix) == ("FAIL", str(refused), f"s6-svc -u {refused}")
        assert first.found == (
            "the service is down (its exit code was 78: the configuration is invalid, or a register or directory "
            "cannot be used)"
        )
        assert (second.level.name, second.fix) == ("WARN", f"s6-svc -u {stopped}")
        assert f"(its exit code was 0, and {stopped}/down exists)" in second.found
        subprocess.run(["s6-svc", "-wu", "-T", str(int(HANG * 1000)), "-u", stopped], check=True)
        assert [result.subject for result in found_in(tmp_path)] == [str(refused)]
        subprocess.run(["s6-svc", "-wD", "-T", str(int(HANG * 1000)), "-d", stopped], check=True)
        assert "its process was killed by signal 15 (SIGTERM)" in found_in(tmp_path)[1].found
        service.close()
    assert found_in(tmp_path) == []


@pytest.mark.s6
def test_a_service_that_s6_starts_again_is_a_problem(tmp_path: Path) -> None:
    again = write_service(
        tmp_path, "again", "kill -9 $$", f"touch {tmp_path}/ended; read line < {tmp_path}/go; exit 125"
    )
    (again / "timeout-finish").write_text("0\n")  # s6 starts the service again once `finish` has ended.
    os.mkfifo(tmp_path / "go")
    with Service(Here(), tmp_path, "again"):  # type: ignore[arg-type]
        wait_path(tmp_path / "ended")
        (result,) = found_in(tmp_path)
        assert (result.level.name, result.fix) == ("FAIL", None)
        assert result.found == (
            "the service is down (its process was killed by signal 9 (SIGKILL)); s6 starts it again"
        )
        (tmp_path / "go").write_text("go\n")


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a stand-in for systemctl, and return a function that sets its output."""
    program = tmp_path / "bin/systemctl"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / "run/systemd/system").mkdir(parents=True)

    def set_output(text: str) -> None:
        program.write_text(f"#!/bin/sh\ncat << 'END'\n{text}END\n")
        program.chmod(0o755)

    return set_output


def unit(name: str, state: str, result: str, code: int, **properties: str) -> str:
    lines = [f"{key}={value}\n" for key, value in properties.items()]
    return f"Result={result}\nExecMainStatus={code}\nId=inco-trio-{name}.service\nActiveState={state}\n" + "".join(
        lines
    )


def units(root: Path, processes: Processes = NONE) -> list[Result]:
    """Return the results for the units of systemd. `root` contains no /proc, so no s6 is found."""
    return [result for service in find_services(processes, root) for result in service.results]


def test_the_units_of_systemd_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, systemctl: Callable[[str], None]
) -> None:
    given = [("a", "failed", "exit-code", 77), ("b", "active", "success", 0), ("c", "inactive", "success", 0)]
    systemctl("\n".join(unit(*each) for each in given))
    assert units(tmp_path / "no such directory") == []  # systemd is installed, but does not run.
    failed, stopped = units(tmp_path)
    assert str(failed) == (
        "inco-trio-a.service: the service is failed (exit-code, exit status 77: a capability or permission is missing, "
        "which its log names): its log is `journalctl -u inco-trio-a.service`"
    )
    assert [failed.level.name, stopped.level.name] == ["FAIL", "WARN"]
    assert stopped.subject == "inco-trio-c.service"
    systemctl("exit")
    (tmp_path / "bin/systemctl").write_text("#!/bin/sh\nexit 1\n")
    assert units(tmp_path) == []
    monkeypatch.setenv("PATH", "")
    assert units(tmp_path) == []


SLOW = "so {}: repeat the check once the host is less busy"
"""The end of the warning for a program that does not end."""


def let_hang(directory: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a program by one that does not end."""
    directory.mkdir(exist_ok=True)
    (directory / program).write_text("#!/bin/sh\nexec sleep infinity\n")
    (directory / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setattr(services, "PATIENCE", 0.1)


def test_a_systemctl_that_does_not_end_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    let_hang(tmp_path / "bin", "systemctl", monkeypatch)
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    (service,) = find_services(NONE, tmp_path)
    (result,) = service.results
    expected = "systemctl got no answer within 0.1 s, " + SLOW.format("the units inco-trio-*.service are not shown")
    assert (result.level.name, result.subject, result.found) == ("WARN", "systemd", expected)
    link = f"unix:{tmp_path}/a,peer={tmp_path}/b"
    boards = tmp_path / "boards"
    boards.mkdir()
    (boards / "b1.json").write_text(json.dumps({"link": link, "irq_dir": str(tmp_path / "irq")}))
    replace_services(monkeypatch, service)
    for words in ([link], ["--boards", str(boards)]):
        main(["doctor", *words, "--json"])
        results = json.loads(capsys.readouterr().out)["results"]
        assert [each["found"] for each in results if each["subject"] == "systemd"] == [expected]


def test_an_s6_svstat_that_does_not_end_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_hang(tmp_path / "bin", "s6-svstat", monkeypatch)
    found = services._state_of_s6(services._Directory(tmp_path, process(3)), (), ())
    assert isinstance(found, Result)
    expected = SLOW.format("it is unknown whether the service is up")
    assert found == warn("service", tmp_path, f"s6-svstat got no answer within 0.1 s, {expected}")


def test_an_fd_store_that_does_not_answer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_hang(tmp_path / "bin", "s6-fdholder-list", monkeypatch)
    store = FoundService(services.FD_STORE, tmp_path / services.FD_STORE)
    (result,) = services.leftovers([store], NONE)
    expected = SLOW.format("notifications of removed services may be stored there but are not shown")
    text = f"s6-fdholder-list got no answer within 0.1 s, {expected}"
    assert result == warn("descriptors", tmp_path / services.FD_STORE / "s", text)


def test_a_service_whose_supervisor_has_just_ended_is_not_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network namespace is unknown: the service may serve an interface of this name in another one."""
    tree, directory = Tree(tmp_path / "root"), write_service(tmp_path, "l0", "exec inco-trio run l0")
    tree.process(30, "s6-supervise inco-trio-l0", name="s6-supervise", uid=os.geteuid())
    (tree.root / "proc/30/cwd").symlink_to(directory)
    processes = look(tree.root, BOOTED)
    assert [each.directory for each in find_services(processes, tree.root)] == [directory]
    read_links = services._links_of

    def end(words: Sequence[str], supervisor: Process | None) -> services._Links:
        (tree.root / "proc/30/cwd").unlink()
        return read_links(words, supervisor)

    monkeypatch.setattr(services, "_links_of", end)
    assert find_services(processes, tree.root) == []


def test_a_unit_that_a_start_does_not_fix_is_not_started(tmp_path: Path, systemctl: Callable[[str], None]) -> None:
    link = f"unix:{tmp_path}/a,peer={tmp_path}/b"
    start = f"{{ path=/bin/inco-trio ; argv[]=/bin/inco-trio run {link} --bogus ; ignore_errors=no ; }}"
    for code in (2, 77):
        systemctl(unit("x", "failed", "exit-code", code, ExecStart=start))
        (result,) = units(tmp_path)
        assert (result.level.name, result.fix) == ("FAIL", None)
    with proxy_of(link, tmp_path) as proxy:
        (own,) = (each for each in look().all if each.pid == proxy.pid)
        (result,) = units(tmp_path, attrs.evolve(NONE, all=(own,)))
        assert (result.level.name, result.fix) == ("WARN", None)
        assert result.found.endswith(" serves its link: end that process only once the service can start")


def test_a_frozen_unit_and_one_that_fails_again_and_again_are_problems(
    tmp_path: Path, systemctl: Callable[[str], None]
) -> None:
    frozen = unit("a", "active", "success", 0, FreezerState="frozen")
    again = unit("b", "activating", "exit-code", 69, SubState="auto-restart", FreezerState="running")
    systemctl(f"{frozen}\n{again}\n{unit('c', 'active', 'success', 0, FreezerState='running')}")
    first, second = units(tmp_path)
    assert (first.level.name, first.fix) == ("FAIL", "systemctl thaw inco-trio-a.service")
    assert (second.level.name, second.fix) == ("FAIL", None)
    assert "exit status 69: the interface or a program is missing, or another process uses" in second.found
    assert second.found.endswith("; systemd starts it again")


def test_a_unit_whose_link_another_proxy_serves_is_not_started(
    tmp_path: Path, systemctl: Callable[[str], None]
) -> None:
    link = f"unix:{tmp_path}/a,peer={tmp_path}/b"
    start = f"{{ path=/bin/inco-trio ; argv[]=/bin/inco-trio run {link} --config u.json ; ignore_errors=no ; }}"
    systemctl("\n".join(unit(name, "inactive", "success", 0, ExecStart=start) for name in ("x", "y")))
    first, second = units(tmp_path)
    assert (first.level.name, first.fix) == ("FAIL", "systemctl start inco-trio-x.service")
    assert (second.level.name, second.fix) == ("FAIL", None)
    assert second.found.endswith("; another service serves the same link: start only one of them")
    with proxy_of(link, tmp_path) as proxy:
        (own,) = (each for each in look().all if each.pid == proxy.pid)
        for supervised, fix, how in (
            ("", f"kill {proxy.pid}", "without a supervisor"),
            ("systemctl stop z.service", "systemctl disable inco-trio-x.service", "in systemd service z.service"),
        ):
            (found, _) = units(tmp_path, attrs.evolve(NONE, all=(attrs.evolve(own, supervised=supervised),)))
            assert (found.level.name, found.fix) == ("WARN", fix)
            assert f"; process {proxy.pid} ({own.name}) {how} serves its link" in found.found


@pytest.mark.parametrize("names", ["ab", "ba"])
@pytest.mark.parametrize("state", ["active", "activating"])
def test_a_unit_is_not_started_next_to_one_that_waits_for_its_link(
    names: str, state: str, tmp_path: Path, systemctl: Callable[[str], None]
) -> None:
    start = "{ path=/bin/inco-trio ; argv[]=/bin/inco-trio run nosuchlink --wait-link ; ignore_errors=no ; }"
    again = {"SubState": "auto-restart"} if state == "activating" else {}
    units_of = {
        "a": unit("a", state, "success", 0, ExecStart=start, **again),
        "b": unit("b", "inactive", "success", 0, ExecStart=start),
    }
    systemctl("\n".join(units_of[name] for name in names))
    (result,) = (each for each in units(tmp_path) if each.subject == "inco-trio-b.service")
    assert (result.level.name, result.fix) == ("FAIL", None)
    assert result.found.endswith("; another service serves the same link: start only one of them")


def test_a_service_whose_state_may_not_be_read_is_named(tmp_path: Path) -> None:
    directory = services._Directory(tmp_path, process(3))
    found = services._state_of_s6(directory, (), ())
    assert isinstance(found, Result)
    assert found.found == f"the state of the service {tmp_path}"


def test_the_service_of_another_user_is_named(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "root")
    tree.process(30, "s6-supervise inco-trio-l0", name="s6-supervise")
    tree.process(31, "s6-supervise inco-trio-l0/log", name="s6-supervise")
    tree.process(32, "s6-supervise other", name="s6-supervise")
    (found,) = services_of("l0", find_services(look(tree.root, BOOTED), tree.root))
    assert [result.found for result in found.results] == ["the state of the service inco-trio-l0"]
    assert found.fix is None


@pytest.mark.parametrize("name", ["s6-supervise", "s6-svscan"])
def test_a_supervisor_of_an_untrusted_user_is_ignored(name: str, tmp_path: Path) -> None:
    """The user chooses its working directory, which can even be one that root may not search (FUSE)."""
    write_service(tmp_path, "x", "exit")
    tree, directory = Tree(tmp_path / "root"), tmp_path / "inco-trio-x" if name == "s6-supervise" else tmp_path
    for pid, uid in ((30, os.geteuid() + 1), (31, os.geteuid())):
        assert find_services(look(tree.root, BOOTED), tree.root) == []
        tree.process(pid, f"{name} x", name=name, uid=uid)
        (tree.root / f"proc/{pid}/cwd").symlink_to(directory)
    (found,) = find_services(look(tree.root, BOOTED), tree.root)
    assert found.directory == tmp_path / "inco-trio-x"


def test_a_signal_without_a_name_is_shown_as_a_number() -> None:
    assert services._signal(250) == "signal 250"


def test_the_fix_for_a_link_without_a_proxy_is_its_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    link = f"unix:{tmp_path}/core0,peer={tmp_path}/core1"
    name = f"inco-trio-{parse_address(link).label}"
    for fix in ("s6-svc -u /s", None):
        service = FoundService(name, results=(warn("service", "/s", "it is down", fix),))
        replace_services(monkeypatch, service)
        main(["doctor", link, "--irq-dir", str(tmp_path), "--json"])
        results = json.loads(capsys.readouterr().out)["results"]
        (found,) = (result for result in results if result["check"] == "proxy")
        assert (found["level"], found["fix"]) == ("fail", fix)
    boards = tmp_path / "boards"
    boards.mkdir()
    (boards / "b1.json").write_text(json.dumps({"link": link, "irq_dir": str(tmp_path)}))
    service = FoundService("inco-trio-boards-1", boards=boards, results=service.results)
    replace_services(monkeypatch, service)
    main(["doctor", "--boards", str(boards), "--json"])
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["fix"] for result in results if result["check"] == "proxy"] == [None]
    assert "service" in [result["check"] for result in results]


def test_the_services_of_a_directory_of_boards_are_found_with_their_fd_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boards, scandir = tmp_path / "boards", tmp_path / "scan"
    boards.mkdir()
    link = f"unix:{tmp_path}/core0,peer={tmp_path}/core1"
    (boards / "b1.json").write_text(json.dumps({"link": link, "irq_dir": str(tmp_path)}))
    (tmp_path / "symlink").symlink_to(boards)
    (store, other), own = (
        FoundService(services.FD_STORE, place / services.FD_STORE, results=(fail("service", place, "down", fix),))
        for place, fix in ((scandir, "s6-svc -u store"), (tmp_path, None))
    ), FoundService("inco-trio-b", scandir / "inco-trio-b", boards=boards)  # fmt: skip
    replace_services(monkeypatch, own, other, store)
    for directory in (boards, tmp_path / "symlink"):
        main(["doctor", "--boards", str(directory), "--json"])
        results = json.loads(capsys.readouterr().out)["results"]
        fixes = [result["fix"] for result in results if result["check"] in ("service", "proxy")]
        assert fixes == ["s6-svc -u store"] * 2
    assert services.services_of_boards(tmp_path, [own, other, store]) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "silent", lambda check, path, _: warn(check, path, "hangs"))
        assert services.services_of_boards(tmp_path / "symlink", [own]) == []
        assert services.services_of_boards(boards, [own]) == [own]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "install -d -o inco-trio -g 7 /run/x\nexec \\\n  python -I -m inco_trio run l0 --config '/a b'",
            "l0 --config /a b",
        ),
        ("exec /usr/bin/inco-trio run --boards /b # inco-trio run l0", "--boards /b"),
        ("exec inco-trio mqtt mqtt://host", ""),
        ("# inco-trio run l0", ""),
        ("exec inco-trio run 'l0", ""),  # a syntax error
    ],
)
def test_the_command_of_a_service_is_read_from_its_script(tmp_path: Path, script: str, words: str) -> None:
    (tmp_path / "run").write_text(f"#!/bin/sh\n{script}\n")
    assert " ".join(services._command_of(tmp_path / "run")) == words
    (tmp_path / "run").unlink()
    assert services._command_of(tmp_path / "run") == ()
    os.mkfifo(tmp_path / "run")
    assert services._command_of(tmp_path / "run") == ()


def test_a_service_of_the_same_interface_in_another_network_namespace_is_another_one() -> None:
    here, other = Path("/proc/self/ns/net"), Path("/proc/self/ns/mnt")  # Any other file serves as a namespace.
    found = [FoundService("inco-trio-l0", links=((parse_address("l0"), netns),)) for netns in (None, other)]
    assert services_of("l0", found) == found[:1]
    assert services_of("l0", found, here) == found[:1]
    assert services_of("l0", found, other) == found[1:]
    unix = [FoundService("x", links=((parse_address("unix:/a,peer=/b"), netns),)) for netns in (None, other)]
    assert services_of("unix:/a,peer=/c", unix) == unix


@pytest.mark.s6
def test_a_stopped_process_of_s6_is_named(tmp_path: Path) -> None:
    """While s6-supervise is stopped, s6-svc has no effect, and s6-svstat reports an old state."""
    link = f"unix:{tmp_path}/a,peer={tmp_path}/b"
    label = parse_address(link).label
    service = write_service(tmp_path, label, f"exec sleep infinity; exec inco-trio run {link}")
    store = write_service(tmp_path, "fdholder", "exec sleep infinity")
    (service / "log").mkdir()
    (service / "log/run").write_text("#!/bin/sh\nexec s6-log ./main\n")
    (service / "log/run").chmod(0o755)
    with Service(Here(), tmp_path, label) as s6:  # type: ignore[arg-type]
        for each in (service, service / "log", store):
            wait_path(each / "supervise/status")
            wait_state(each, "up", "true")
        wait_path(service / "log/main/current")
        assert found_in(tmp_path) == []
        (scanner,) = (
            each.pid for each in look().all if each.name == "s6-svscan" and working_directory(each.pid) == tmp_path
        )
        supervisor, program, logger = pid_of(service), main_process(service), main_process(service / "log")
        stored = main_process(store)
        expected = {supervisor: "WARN", logger: "WARN", scanner: "WARN", stored: "FAIL", program: "FAIL"}
        for pid, level in expected.items():
            with stopped(pid):
                # Both services report the s6-svscan.
                (result,) = {each for service in services_of(link, find_services(look())) for each in service.results}
                assert (result.level.name, result.fix) == (level, f"kill -CONT {pid}")
                assert result.found.startswith(f"process {pid} (")
                run_fix(result)
        assert found_in(tmp_path, link) == []
        with stopped(supervisor):
            ended = os.pidfd_open(program)
            os.kill(program, signal.SIGKILL)
            assert select.select([ended], [], [], HANG)[0] == [ended]
            os.close(ended)
            (result,) = found_in(tmp_path, link)
            assert (result.level.name, result.fix) == ("FAIL", f"kill -CONT {supervisor}")
            assert "s6-svc has no effect, and the service is not restarted" in result.found
            run_fix(result)
        # Meanwhile, `finish` runs.
        wait_path(
            service / "supervise/status", lambda: main_process(service) != program and svstat(service, "up") == "true"
        )
        assert found_in(tmp_path, link) == []
        s6.close()


@pytest.mark.s6
def test_a_stopped_job_in_the_directory_of_a_service_is_not_its_process(tmp_path: Path) -> None:
    service = write_service(tmp_path, "l0", "exec sleep infinity")
    with Service(Here(), tmp_path, "l0") as s6:  # type: ignore[arg-type]
        s6.wait("u")
        with subprocess.Popen(["sleep", "infinity"], cwd=service) as job:
            try:
                wait_stopped(job.pid)
                assert found_in(tmp_path) == []
                with stopped(main_process(service)):
                    (result,) = found_in(tmp_path)
                    assert result.fix == f"kill -CONT {main_process(service)}"
            finally:
                job.kill()


@pytest.mark.parametrize(("name", "count"), [("s6-log", 1), ("sleep", 0)])
def test_a_process_of_another_user_in_the_directory_of_a_service_is_ignored(
    name: str, count: int, tmp_path: Path
) -> None:
    service = write_service(tmp_path, "l0", "exec sleep infinity")
    tree = Tree(tmp_path / "root")
    for pid, program, uid in ((30, "s6-supervise", os.geteuid()), (31, name, os.geteuid()), (32, name, 12345)):
        tree.process(pid, program, name=program, uid=uid, parent=1)
        (tree.root / f"proc/{pid}/cwd").symlink_to(service)
    processes = look(tree.root, BOOTED)
    places = dict.fromkeys((30, 31, 32), service)
    own = services._processes_of(service, places, processes, tree.root)
    assert [each.pid for each in own] == [30, 31][: count + 1]
    tree.status("32", 12345, parent=30)
    own = services._processes_of(service, places, processes, tree.root)
    assert [each.pid for each in own] == [30, *[31][:count], 32]


@pytest.mark.s6
def test_a_service_without_an_s6_supervise_is_a_problem(tmp_path: Path) -> None:
    scandir = tmp_path / "scan"
    (scandir / "other").mkdir(parents=True)
    with Service(Here(), scandir, "l0"):  # type: ignore[arg-type]
        wait_path(scandir / "other/supervise/status")  # s6-svscan has looked for services.
        service = write_service(scandir, "l0", "exec sleep infinity")
        real = write_service(tmp_path, "l1", "exec sleep infinity")
        (scandir / real.name).symlink_to(real)  # as s6-rc does
        results = [result for each in ("l0", "l1") for result in found_in(tmp_path, each)]
        assert [(result.subject, result.fix) for result in results] == [
            (str(directory), f"s6-svscanctl -a {scandir}") for directory in (service, real)
        ]
        assert [result.found for result in results] == ["no s6-supervise runs for this service"] * 2
        run_fix(results[0])
        for directory in (service, real):
            wait_path(directory / "supervise/status")
            wait_state(directory, "up", "true")
        assert found_in(tmp_path) == []
        (found,) = services_of("l1", find_services(look()))
        assert found.directory == real


@pytest.mark.s6
def test_the_s6_supervise_of_a_symlinked_service_with_another_name_is_found(tmp_path: Path) -> None:
    real = write_service(tmp_path, "real", "exec sleep infinity").rename(tmp_path / "proxy")
    scandir = tmp_path / "scan"
    scandir.mkdir()
    (scandir / "inco-trio-l0").symlink_to(real)
    with Service(Here(), scandir, "l0") as service:  # type: ignore[arg-type]
        service.wait("u")
        (found,) = (each for each in find_services(look()) if each.directory == real)
        assert found.results == ()
        service.control("-d")
        service.wait("D")
        (result,) = (each for found in find_services(look()) if found.directory == real for each in found.results)
        assert (result.level.name, result.fix) == ("WARN", f"s6-svc -u {real}")


@pytest.mark.s6
def test_a_service_whose_files_hang_has_one_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_service(tmp_path, "l0", "exec sleep infinity")

    def hang(check: str, path: Path, _: object) -> Result | None:
        return warn(check, path, "hangs") if path == directory else None

    with Service(Here(), tmp_path, "l0") as service:  # type: ignore[arg-type]
        service.wait("u")
        monkeypatch.setattr(services, "silent", hang)
        assert [result.found for result in found_in(tmp_path)] == ["hangs"]
        assert [each.directory for each in find_services(look()) if each.directory == directory] == [directory]


@pytest.mark.s6
def test_an_invalid_configuration_is_corrected_before_the_service_is_started(tmp_path: Path) -> None:
    config, link = tmp_path / "u.json", f"unix:{tmp_path}/a,peer={tmp_path}/b"
    config.write_text("{}")
    label = parse_address(link).label
    service = write_service(tmp_path, label, f"exit 78\nexec inco-trio run {link} --config {config}", "exit 125")
    with Service(Here(), tmp_path, label):  # type: ignore[arg-type]
        wait_path(service / "supervise/status")
        wait_state(service, "wantedup", "false")
        (result,) = found_in(tmp_path, link)
        assert (result.level.name, result.fix) == ("FAIL", f"inco-trio check --config {config}")
        assert f"; {config}: " in result.found
        write_udrv(config, tmp_path / "irq")
        (tmp_path / "irq/message_4_state").mkdir(parents=True)
        (tmp_path / "irq").chmod(0o777)
        (tmp_path / "irq/message_2_trig").touch(0o600)
        for problem, fix in (
            ("not trusted: other users may write to", None),
            ("a directory, not a regular file", f"rmdir {tmp_path}/irq/message_4_state"),
        ):
            (result,) = found_in(tmp_path, link)
            assert (result.level.name, result.fix) == ("FAIL", fix)
            assert problem in result.found
            (tmp_path / "irq").chmod(0o755)
        (tmp_path / "irq/message_4_state").rmdir()
        (result,) = found_in(tmp_path, link)
        assert (result.level.name, result.fix) == ("FAIL", f"s6-svc -u {service}")


@pytest.mark.netns
def test_a_path_that_the_user_of_a_service_may_not_use_is_named() -> None:
    daemon = pwd.getpwnam("daemon")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        config, irq, data = Path(home, "u.json"), Path(home, "irq"), Path(home, "data")
        Path(home).chmod(0o755)
        write_udrv(config, irq)
        data.mkdir()
        (data / "uid").write_text(f"{daemon.pw_uid}\n")
        user = services._user_of(Path(home))
        assert user == "daemon"
        assert services._user_of(config) is None

        def obstacle(*options: str) -> tuple[str, str | None] | None:
            words = ("l0", "--config", str(config), *options)
            return services._obstacle(services._Down(home, "", words, (), "", None, user=user))

        create = f"install -d -o daemon -g {daemon.pw_gid} {irq}"
        assert obstacle() == (f"{irq}: the user daemon may not create it", create)
        subprocess.run(["sh", "-ec", create], check=True)
        assert obstacle() is None
        os.chown(irq, 12345, -1)
        problem, fix = obstacle() or ("", "")
        assert problem.startswith(
            f"{irq}: not trusted: {irq} belongs to uid 12345; run the proxy as this user, or trust"
        )
        assert fix == f"chown {daemon.pw_uid} {irq}"
        assert obstacle("--irq-owner", "12345") is None
        assert obstacle("--irq-owner", "no such user") is not None
        config.chmod(0o600)
        problem, share = obstacle("--irq-owner", "12345") or ("", None)
        assert problem == f"{config}: the user daemon may not read it, so the service cannot start"
        assert share == f"chgrp {daemon.pw_gid} {config} && chmod g+r {config}"
        # With this exit code, the next result would name no command.
        words = ("l0", "--config", str(config), "--irq-owner", "12345")
        down = services._Down(home, "", words, (), "true", None, code="77", user=user)
        result = services._verdict(down, NONE, set())
        assert result.fix == f"{share} && true"
        run_fix(result)
        assert obstacle("--irq-owner", "12345") is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(services, "silent", lambda check, path, _: warn(check, path, "hangs"))
            assert obstacle() is None
        config.unlink()
        assert obstacle() == (
            f"{config}: cannot be read: No such file or directory",
            f"inco-trio check --config {config}",
        )


def test_a_service_is_removed_only_if_a_supervisor_runs_each_proxy_of_its_link() -> None:
    remove = "rm -r /s/l0 && s6-svscanctl -an /s"
    down = services._Down("/s/l0", "it is down", (), ((parse_address("l0"), None),), "s6-svc -u /s/l0", remove)
    fleet = process(2, "inco-trio run --boards /b", name="inco-trio")
    supervised = attrs.evolve(fleet, pid=3, supervised="s6-svc -d /s/boards")
    store = process(4, "s6-fdholderd", name="s6-fdholderd")
    kept = "; the service delivers again what process 4 (s6-fdholderd) keeps"
    for proxies, fix, advice in (
        ([supervised], remove, "so remove this service unless you still need it"),
        ([fleet], None, "so do not start this service while it runs"),
        ([fleet, supervised], None, "so do not start this service while it runs"),
    ):
        for holders, end in (((), ""), ((store,), kept)):
            result = services._superseded(down, {"l0": proxies}, holders)
            assert (result.level.name, result.fix) == ("WARN", fix)
            assert result.found.endswith(f" serves its link, {advice}{end}")


@pytest.mark.parametrize(
    ("words", "link"),
    [
        ("l0 --config {}", "l0"),
        ("--config {} l0", "l0"),
        ("--config={} l0", "l0"),
        ("--wait-link --config {}", None),
        ("--config {}", None),
        ("", None),
    ],
)
def test_the_link_may_follow_the_options(words: str, link: str | None, tmp_path: Path) -> None:
    config = write_udrv(tmp_path / "u.json", tmp_path / "irq")
    (tmp_path / "irq").mkdir()
    command = tuple(words.format(config).split())
    assert [address.name for address, _ in services._links_of(command, None)] == ([] if link is None else [link])
    assert services._obstacle(services._Down(tmp_path, "", command, (), "", None)) is None


@contextmanager
def proxy_of(link: str, home: Path) -> Iterator[Proxy]:
    """Run a proxy of a link without a supervisor."""
    proxy = Proxy(None, [link, "--irq-dir", str(home / "irq"), "--control", "none"], {}, home / "proxy.log")
    try:
        proxy.wait_ready()
        yield proxy
    finally:
        proxy.close()


@pytest.mark.s6
def test_a_service_is_not_started_next_to_another_proxy_of_its_link(tmp_path: Path) -> None:
    boards = tmp_path / "boards"
    boards.mkdir()
    links = {name: f"unix:{tmp_path}/{name}.0,peer={tmp_path}/{name}.1" for name in ("b1", "b2")}
    for name, link in links.items():
        (boards / f"{name}.json").write_text(json.dumps({"link": link, "irq_dir": str(tmp_path / name)}))
    scandir = tmp_path / "scan"
    label = parse_address(links["b1"]).label
    single = write_service(scandir, label, f"sleep infinity; exec inco-trio run {links['b1']} --config /u.json")
    several = write_service(scandir, "boards-1", f"sleep infinity; exec inco-trio run --boards {boards}")
    again = write_service(scandir, "again", f"exit 69; exec inco-trio run {links['b1']}", f"read line < {tmp_path}/go")
    (again / "timeout-finish").write_text("0\n")  # s6 starts the service again once `finish` has ended.
    os.mkfifo(tmp_path / "go")
    for each in (single, several):
        (each / "down").touch()
    with Service(Here(), scandir, label):  # type: ignore[arg-type]
        for each in (single, several, again):
            wait_path(each / "supervise/status")
        wait_state(again, "exitcode", "69")

        def found(*supervised: str) -> dict[str, Result]:
            processes = look()
            if supervised:
                changed = [
                    attrs.evolve(each, supervised=supervised[0]) if each.pid == proxy.pid else each
                    for each in processes.all
                ]
                processes = attrs.evolve(processes, all=tuple(changed))
            results = [each for service in find_services(processes) for each in service.results]
            return {each.subject: each for each in results if each.subject.startswith(f"{scandir}/")}

        assert found()[str(again)].found.endswith("; s6 starts it again")
        with proxy_of(links["b1"], tmp_path) as proxy:
            named = f"process {proxy.pid} ("
            result = found()[str(single)]
            assert (result.level.name, result.fix) == ("WARN", f"kill {proxy.pid}")
            assert named in result.found
            assert f") without a supervisor serves its link: end that process first, then run `s6-svc -u {single}`" in (
                result.found
            )
            result = found()[str(again)]
            assert (result.level.name, result.fix) == ("WARN", f"kill {proxy.pid}")
            assert result.found.endswith("end that process first, s6 then starts the service")
            # One of the boards has no proxy.
            assert found()[str(several)].level.name == "WARN"
            result = found("s6-svc -d /x")[str(several)]
            assert (result.level.name, result.fix) == ("FAIL", None)
            assert f"serves {tmp_path}/b1.0, so do not start both" in result.found
            (boards / "b2.json").unlink()
            for service in (single, several):
                result = found("s6-svc -d /x")[str(service)]
                assert (result.level.name, result.fix) == (
                    "WARN",
                    f"rm -r {service} && s6-svscanctl -an {scandir}",
                )
                assert (
                    "in s6 service /x serves its link, so remove this service unless you still need it" in result.found
                )
            result = found("s6-svc -d /x")[str(again)]
            assert (result.level.name, result.fix) == ("WARN", f"s6-svc -d {again}")
            ended = os.pidfd_open(pid_of(single))
            run_fix(found("s6-svc -d /x")[str(single)])
            assert select.select([ended], [], [], HANG)[0] == [ended]
            os.close(ended)
            assert str(single) not in found()
        (tmp_path / "go").write_text("go\n")


@pytest.mark.s6
def test_the_descriptors_of_a_removed_service_are_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scandir, links = tmp_path / "a scan", [f"unix:{tmp_path}/{name}.0,peer={tmp_path}/{name}.1" for name in "ab"]
    for link in links:
        write_scandir(scandir, link, write_udrv(tmp_path / "u.json", tmp_path / "irq"))
    labels = [parse_address(link).label for link in links]
    store = scandir / services.FD_STORE / "s"

    def stored() -> set[str]:
        listed = subprocess.check_output(["s6-fdholder-list", store], text=True).split()
        return {label for label in labels if any(each.startswith(f"inco-trio/{label}/") for each in listed)}

    def found(*words: str) -> list[dict[str, str]]:
        main(["doctor", *words, "--json"])
        results = json.loads(capsys.readouterr().out)["results"]
        return [each for each in results if each["subject"] == str(store)]

    with Service(Here(), scandir, labels[0]) as service:  # type: ignore[arg-type]
        service.wait("U")
        service.control("-d")
        service.wait("D")
        # The service still exists, so its descriptors are needed.
        assert found() == found(links[0]) == []
        ended = os.pidfd_open(pid_of(service.directory))
        subprocess.run(["rm", "-r", service.directory], check=True)
        subprocess.run(["s6-svscanctl", "-an", scandir], check=True)
        assert select.select([ended], [], [], HANG)[0] == [ended]
        os.close(ended)
        (result,) = found()
        assert found(links[1]) == []
        assert result["found"].startswith(f"keeps 3 descriptors of inco-trio-{labels[0]}, a service that was removed, ")
        config = str(tmp_path / "u.json")
        for words in (list[str](), [links[0]], [links[0], "--config", config]):
            (again,) = found(*words)
            _, way_back, delete = again["found"].split("`")
            assert delete == ", with the options that it had; this command discards them"
            words += ["LINK", "--config", "FILE"][len(words) :]
            expected = ["inco-trio", "service", "s6", str(scandir), *words, "&&", "s6-svscanctl", "-a", str(scandir)]
            assert shlex.split(way_back) == expected
            assert again["fix"] == result["fix"]
        assert stored() == set(labels)
        # A process that uses them need not be in a service.
        command: list[str | Path] = ["s6-fdholder-getdump", store, sys.executable, "-m", "inco_trio", "run", links[0]]
        command += ["--config", tmp_path / "u.json", "--fd-holder", store, "--control", "none"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
            assert running.stderr is not None
            assert any("ready" in line for line in running.stderr)
            assert found() == []
            running.terminate()
            running.communicate(timeout=HANG)
        subprocess.run(["sh", "-ec", result["fix"]], check=True, timeout=HANG)
        assert stored() == {labels[1]}
        assert found() == found(links[0]) == []


@pytest.mark.s6
def test_the_command_that_writes_the_service_again_fits_its_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scandir = tmp_path / "scan"
    write_scandir(scandir, "l0", write_udrv(tmp_path / "u.json", tmp_path / "irq"))
    shutil.rmtree(scandir / "inco-trio-l0")
    store = scandir / services.FD_STORE / "s"
    with Service(Here(), scandir, "fdholder") as service, socket.socket() as stored:  # type: ignore[arg-type]
        service.wait("U")
        for name in ("lx/link.1", "boards-1/link.1", "wire-b/link.1", "another/program/link.1"):
            subprocess.run(["s6-fdholder-store", store, f"inco-trio/{name}"], stdin=stored.fileno(), check=True)
        stored.close()
        main(["doctor", "--json"])
        results = [each for each in json.loads(capsys.readouterr().out)["results"] if each["subject"] == str(store)]
        written = {each["found"].split("`")[1].partition(" && ")[0] for each in results}
        # A stopped fd store does not answer.
        holder = main_process(service.directory)
        with stopped(holder), pytest.MonkeyPatch.context() as patch:
            patch.setattr(services, "PATIENCE", 0.1)
            (result,) = (
                each for each in services.leftovers(find_services(look()), look()) if each.subject == str(store)
            )
        assert (result.level.name, result.fix) == ("WARN", f"kill -CONT {holder}")
        assert result.found.startswith("s6-fdholder-list got no answer within 0.1 s, so notifications of removed ")
        assert written == {
            f"inco-trio service s6 {scandir} {words}"
            for words in ("LINK --config FILE", "--boards DIR", "LINK --mqtt-link URL --end CORE")
        }


@pytest.mark.s6
@pytest.mark.parametrize("name", ["rpmsg", "inco-trio-x"])  # The latter is the name for the link x.
def test_the_descriptors_of_a_service_in_another_directory_are_not_deleted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scandir, link = tmp_path / "scan", f"unix:{tmp_path}/a.0,peer={tmp_path}/a.1"
    write_scandir(scandir, link, write_udrv(tmp_path / "u.json", tmp_path / "irq"))
    label, store = parse_address(link).label, scandir / services.FD_STORE / "s"
    directory = (scandir / f"inco-trio-{label}").rename(scandir / name)

    def found(*words: str) -> list[str]:
        main(["doctor", *words, "--json"])
        results = json.loads(capsys.readouterr().out)["results"]
        return [each["found"] for each in results if each["subject"] == str(store)]

    with Service(Here(), scandir, label) as service:  # type: ignore[arg-type]
        service.directory = directory
        service.wait("U")
        assert f"inco-trio/{label}/" in subprocess.check_output(["s6-fdholder-list", store], text=True)
        assert found() == found(link) == []
        service.control("-d")
        service.wait("D")
        # While the service is down, the fd store keeps its notifications.
        assert found() == found(link) == []


def test_an_fd_store_whose_users_are_unknown_may_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    store, own = Path("/run/service", services.FD_STORE), Path("/run/service/inco-trio-l0")
    places = {1: store, 2: store, 3: own, 4: Path("/root")}
    monkeypatch.setattr(services, "working_directory", places.get)
    supervisor, holder = process(1, name="s6-supervise", sockets=(9,)), process(2, name="s6-fdholderd", sockets=(8, 9))
    proxy, other = process(3, sockets=(8,)), process(4, sockets=(9,))

    def is_shared(*found: Process, labels: Sequence[str] = ("l0", "l1")) -> bool:
        return services._is_shared(store, labels, Processes(found, unseen=False, mounted=True))

    # All processes can inherit the socket 9 from s6-svscan as their output.
    assert not is_shared(supervisor, holder, proxy, other)
    assert is_shared(supervisor, holder, proxy, labels=["l1"])
    assert is_shared(supervisor, holder, proxy, attrs.evolve(other, sockets=frozenset({8})))
    # The descriptors of these processes are hidden.
    hidden = attrs.evolve(other, hidden=True, command=("inco-trio", "run", "l1", "--fd-holder", "s"))
    assert is_shared(supervisor, holder, hidden)
    assert is_shared(supervisor, attrs.evolve(holder, hidden=True))
