"""Tests of the doctor's checks of services: with a real s6, and with a stand-in for systemctl."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from inco_trio.cli import main
from inco_trio.doctor import services
from inco_trio.doctor.result import Result, warn
from inco_trio.doctor.services import not_running
from inco_trio.linux.processes import Processes, look
from netns.hang import HANG
from tests.core1 import Here
from tests.faults.supervised import Service, wait_path

NONE = Processes((), unseen=False, mounted=True)


def write_service(scandir: Path, label: str, run: str, finish: str = "exit 0") -> Path:
    directory = scandir / f"inco-trio-{label}"
    directory.mkdir(parents=True)
    for name, script in (("run", run), ("finish", finish)):
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    return directory


def found_in(scandir: Path, label: str = "*") -> list[Result]:
    """Return the results for the services in one scan directory. Other tests may run other services."""
    return [result for result in not_running(look(), label) if result.subject.startswith(f"{scandir}/")]


@pytest.mark.s6
def test_a_service_that_is_down_is_reported_with_its_reason_and_its_log(tmp_path: Path) -> None:
    refused = write_service(tmp_path, "refused", "exit 78", "exit 125")
    stopped = write_service(tmp_path, "stopped", "exec sleep infinity")
    (stopped / "down").touch()
    with Service(Here(), tmp_path, "refused") as service:  # type: ignore[arg-type]
        wait_path(stopped / "supervise/status")
        # The service is down before its first start, too. Wait until s6-supervise does not want it up.
        state = ["s6-svstat", "-o", "wantedup", str(refused)]
        wait_path(
            refused / "supervise/status",
            lambda: (refused / "supervise/status").exists() and subprocess.check_output(state) == b"false\n",
        )
        first, second = found_in(tmp_path)
        assert found_in(tmp_path, "stopped") == [second]
        assert (first.level.name, first.subject, first.fix) == ("FAIL", str(refused), f"s6-svc -u {refused}")
        assert first.found == f"the service is down (its exit code was 78): its log is {refused}/log/main/current"
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
            f"the service is down (its process was killed by signal 9 (SIGKILL)): its log is {again}/log/main/current; "
            "s6 starts it again"
        )
        (tmp_path / "go").write_text("go\n")


def test_the_units_of_systemd_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin/systemctl"
    program.parent.mkdir()
    units = [("a", "failed", "exit-code", 78), ("b", "active", "success", 0), ("c", "inactive", "success", 0)]
    blocks = "\n".join(
        f"Result={result}\nExecMainStatus={code}\nId=inco-trio-{name}.service\nActiveState={state}\n"
        for name, state, result, code in units
    )
    program.write_text(f"#!/bin/sh\ncat << 'END'\n{blocks}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert list(not_running(NONE, root=tmp_path)) == []  # systemd is installed, but does not run.
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    failed, stopped = not_running(NONE, root=tmp_path)
    assert str(failed) == (
        "inco-trio-a.service: the service is failed (exit-code, exit status 78): its log is "
        "`journalctl -u inco-trio-a.service`: run: systemctl start inco-trio-a.service"
    )
    assert [failed.level.name, stopped.level.name] == ["FAIL", "WARN"]
    assert stopped.subject == "inco-trio-c.service"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert list(not_running(NONE, root=tmp_path)) == []
    monkeypatch.setattr(services, "PATIENCE", 0.0)
    assert list(not_running(NONE, root=tmp_path)) == []
    monkeypatch.setenv("PATH", "")
    assert list(not_running(NONE, root=tmp_path)) == []


def test_a_service_whose_state_may_not_be_read_is_named(tmp_path: Path) -> None:
    (result,) = services._s6(tmp_path)
    assert result.found == f"the state of the service {tmp_path}"


def test_a_signal_without_a_name_is_shown_as_a_number() -> None:
    assert services._signal(250) == "signal 250"


def test_the_fix_for_a_link_without_a_proxy_is_its_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for fix in ("s6-svc -u /s", None):
        monkeypatch.setattr(services, "not_running", lambda *_, fix=fix: [warn("service", "/s", "it is down", fix)])
        main(["doctor", f"unix:{tmp_path}/core0,peer={tmp_path}/core1", "--irq-dir", str(tmp_path), "--json"])
        results = json.loads(capsys.readouterr().out)["results"]
        (found,) = (result["fix"] for result in results if result["check"] == "proxy")
        assert found == fix or (fix is None and found.startswith("inco-trio run unix:"))
