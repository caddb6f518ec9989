"""Tests of the gateway's configuration: the URL and the file."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from inco_trio.errors import ConfigError, IncoError, InvalidArgumentError, PermissionDeniedError
from inco_trio.mqtt.configuration import Credentials, GatewayConfig, Identity, parse_broker, read_gateway
from inco_trio.mqtt.topics import Topics, level, name_of
from inco_trio.signals import Direction
from tests.support_control import COMMAND

PAGE = Path(__file__).parents[1] / "docs/mqtt.md"


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mqtt://broker", "mqtt://broker:1883/inco-trio"),
        ("mqtts://broker/", "mqtts://broker:8883/inco-trio"),
        ("mqtt://[::1]:7/lab/host1/", "mqtt://[::1]:7/lab/host1"),
        ("mqtt://h/a%20b", "mqtt://h:1883/a b"),
    ],
)
def test_broker_urls_are_parsed(url: str, shown: str) -> None:
    assert str(parse_broker(url)) == shown


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("", "unknown scheme \\(expected mqtt://"),
        ("broker", "unknown scheme \\(expected mqtt://"),
        ("http://broker", "unknown scheme \\(expected mqtt://"),
        ("mqtt://", "the host is missing"),
        ("mqtt://:1883/x", "the host is missing"),
        ("mqtt://h:0", "port 0"),
        ("mqtt://h:65536", "[Pp]ort"),
        ("mqtt://h:x", "[Pp]ort"),
        ("mqtt://[::1", "IPv6"),
        ("mqtt://h/a?b", "contains '\\?' or '#'"),
        ("mqtt://h/a#", "contains '\\?' or '#'"),
        ("mqtt://h/a/+/b", "prefix"),
        ("mqtt://h/%23", "prefix"),
        ("mqtt://h/%00", "prefix"),
        ("mqtt://h/$SYS", "prefix"),
        ("mqtt://h/a//b", "empty level"),
        ("mqtt://h/" + "a" * 1001, "1,000"),
    ],
)
def test_invalid_broker_urls_are_refused(url: str, fault: str) -> None:
    with pytest.raises(InvalidArgumentError, match=fault) as refused:
        parse_broker(url)
    assert len(str(refused.value).splitlines()) == 1


def test_a_url_with_user_is_refused_without_showing_the_password() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_broker("mqtt://me:secret@h")
    assert "secret" not in str(refused.value)


def test_the_file_of_the_page_is_valid(tmp_path: Path) -> None:
    (code,) = re.findall(r'^( {4}\{"send".*?)\n\n', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "gateway.json"
    path.write_text(code)
    config = read_gateway(path)
    assert config.send == {"b1": ["redun_notify_irq"]}
    assert config.broker.key_file == "/etc/inco-trio/host1.key"


def test_an_empty_file_has_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "gateway.json"
    path.write_text("{}")
    assert read_gateway(path) == GatewayConfig()
    assert read_gateway(path).broker.read() == Identity(None, None)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(
        '{"boards": "b1", "boards": 3, "send": {"b1": "x", "b2": [1]}, "status_seconds": "1", "more": 1,'
        ' "broker": {"ca_file": 1, "certificate": ""}}'
    )
    with pytest.raises(ConfigError) as refused:
        read_gateway(path)
    lines = [line.removeprefix(f"{path}: ") for line in refused.value.problems]
    for start in ("boards: given more than once", "boards: ", "send", "status_seconds: ", "more: ", "broker.ca_file: ",
                  "broker.certificate: unknown"):  # fmt: skip
        assert any(line.startswith(start) for line in lines), (start, lines)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"status_seconds": 0}, "status_seconds: 0 (expected seconds"),
        ({"status_seconds": True}, "status_seconds: a boolean (expected seconds"),
        ({"boards": []}, "boards: an empty list"),
        ({"boards": ["a"], "send": {"b": ["*"]}}, "send.b: not a served board"),
        ({"send": {"*": ["two words"]}}, "send.*: 'two words': a wire name"),
        ({"response_prefix": "a/+"}, "response_prefix: 'a/+' contains '+'"),
        ({"response_prefix": ""}, "response_prefix: '' has an empty level"),
        ({"response_prefix": "/a"}, "response_prefix: '/a' has an empty level"),
        ({"broker": {"ca_file": "ca.pem"}}, "broker.ca_file: 'ca.pem' (expected an absolute path)"),
        ({"broker": {"key_file": "/key"}}, "broker: certificate_file or key_file is missing"),
        ({"broker": {"password_file": "/word"}}, "broker: password_file needs user_file"),
        ({"broker": None}, "broker"),
        ({"send": None}, "send"),
    ],
)
def test_invalid_values_are_refused(tmp_path: Path, config: object, line: str) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as refused:
        read_gateway(path)
    assert str(refused.value).startswith(f"{path}: {line}")
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize("prefix", ["lab", "lab/host1", "lab/host1/b1/send"])
def test_responses_cannot_be_requests_of_the_gateway(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps({"response_prefix": prefix}))
    with pytest.raises(ConfigError, match="overlaps the prefix 'lab/host1'"):
        read_gateway(path).check_response_prefix(parse_broker("mqtt://h/lab/host1"))


@pytest.mark.parametrize("prefix", ["lab/host", "lab/host11", "responses"])
def test_responses_may_have_another_prefix(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps({"response_prefix": prefix}))
    read_gateway(path).check_response_prefix(parse_broker("mqtt://h/lab/host1"))


def test_user_and_password_are_read_from_files(tmp_path: Path) -> None:
    user, word = tmp_path / "user", tmp_path / "word"
    user.write_text("me\n")
    word.write_text("pä ss")
    identity = Credentials(user_file=str(user), password_file=str(word)).read()
    assert (identity.user, identity.password) == ("me", "pä ss")
    assert "pä ss" not in repr(identity)


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\n", b"\xff", b"a\0b", b"x" * 70_000])
def test_credential_files_must_have_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "user"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broker\.user_file"):
        Credentials(user_file=str(path)).read()


def test_error_names_a_missing_credential_file(tmp_path: Path) -> None:
    with pytest.raises(IncoError, match="nowhere") as refused:
        Credentials(user_file=str(tmp_path / "nowhere")).read()
    assert isinstance(refused.value, ConfigError | PermissionDeniedError)


@pytest.mark.parametrize("board", ["b1", "/run/b1/core0", "ä", "\udcff", "x" * 1000])
def test_client_ids_suit_every_broker(board: str) -> None:
    """Brokers must accept client IDs of up to 23 bytes (MQTT 5, 3.1.3.1). Some brokers refuse `/` and `:`."""
    assert re.fullmatch("[0-9a-zA-Z-]{1,23}", Topics("lab", board).client_id)
    assert Topics("lab", board).client_id != Topics("lab", f"{board}x").client_id


@pytest.mark.parametrize("name", ["b1", "/run/b1/core0", "a+b#c%d", "ä", "\udcff", "\n", "$SYS", "", "a b"])
def test_a_board_name_stays_one_topic_level(name: str) -> None:
    assert not set(level(name)) & set("/+#")
    assert name_of(level(name)) == name
    topics = Topics("lab", "x/y")
    assert topics.signal_of(topics.sends.removesuffix("+") + level(name)) == name
    assert topics.signal_of(level(name)) is topics.signal_of(f"{topics.sends}/{level(name)}") is None
    assert topics.notification(Direction.INBOUND, name).count("/") == 3


def test_check_prints_what_a_gateway_may_send(tmp_path: Path) -> None:
    path = tmp_path / "gateway.json"
    path.write_text('{"boards": ["a", "b"], "send": {"a": ["x_irq"], "*": ["*"], "b": []}}')
    done = run_command("check", "--gateway", str(path))
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        ["boards: a, b", "may be sent to a: x_irq", "may be sent to all boards: all signals", "may be sent to b: none"],
    )
    assert json.loads(run_command("check", "--gateway", str(path), "--json").stdout)["boards"] == ["a", "b"]
    path.write_text("{}")
    assert run_command("check", "--gateway", str(path)).stdout.splitlines() == ["boards: all", "nothing may be sent"]
    path.write_text('{"response_prefix": "lab/responses"}')
    assert "responses are published below lab/responses/" in run_command("check", "--gateway", str(path)).stdout
    path.write_text('{"broker": {"user_file": "/nowhere"}}')
    done = run_command("check", "--gateway", str(path))
    assert (done.returncode, "broker.user_file" in done.stderr or "/nowhere" in done.stderr) == (78, True)
    assert run_command("check", "--gateway", str(path), "--boards", "/x").returncode == 2
