"""What a supervisor needs to run inco-trio: an s6 scan directory, or a systemd unit.

The s6 services refer to each other by relative paths: a scan directory can be copied or moved, and the length of its
path does not count against the 107 bytes of a socket's address. See https://skarnet.org/software/s6/servicedir.html,
https://skarnet.org/software/s6/s6-fdholderd.html (rules), systemd.service(5) and systemd.exec(5).
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from inco_trio.config import read_udrv
from inco_trio.errors import (
    STRERROR,
    IncoError,
    InvalidArgumentError,
    PermissionDeniedError,
    from_os_error,
)
from inco_trio.links.address import UnixAddress, parse_address

__all__ = [
    "Client",
    "Service",
    "boards_service",
    "exporter_service",
    "find_program",
    "gateway_service",
    "link_service",
    "systemd_unit",
    "wire_service",
    "write_scandir",
]

_HOLDER = "inco-trio-fdholder"
_SERVICE = "inco-trio-"
_GATEWAY, _EXPORTER, _WIRE = "mqtt", "exporter", "wire-"
_OURS = {"fdholder": "the fd holder", _GATEWAY: "the gateway", _EXPORTER: "the exporter"}
"""Labels that no link has."""

_MISPLACED = frozenset({
    errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.EROFS, errno.EINVAL,
})  # fmt: skip
"""What is wrong with the place that was named, and not with the system."""

_RUN = """\
#!/bin/sh
# Written by `inco-trio s6`: run that again rather than edit this file.
exec 2>&1
# Without the fd holder nothing that waits could be taken over. s6-svwait fails while s6-svscan has not started it yet.
for try in 1 2 3 4 5; do
  s6-svwait -U -t 10000 ../{holder} 2>/dev/null && break
  sleep 0.1
done
# No shell may stand after s6-fdholder-getdump: it would drop the variable S6_FD#.
exec s6-fdholder-getdump -t 10000 ../{holder}/s \\
{setpriv}  {program}
"""

_RUN_WITHOUT_HOLDER = """\
#!/bin/sh
# Written by `inco-trio s6`: run that again rather than edit this file.
exec 2>&1
exec \\
{setpriv}  {program}
"""

# Privileges are dropped after the dump, which only root may read. CAP_NET_RAW is for the AF_PACKET socket.
_SETPRIV = """\
  setpriv --reuid {user} --regid {gid} --init-groups --no-new-privs \\
  --inh-caps=-all{capability} --ambient-caps=-all{capability} \\
"""

_FINISH = """\
#!/bin/sh
# $1: exit code of run, 256 if a signal killed it; $3: this service. Exit code 125 tells s6 not to start run again.
case $1 in
2) why='the command line is wrong' ;;
77) why='a permission is missing' ;;
78) why='the configuration is invalid' ;;
*) exit 0 ;;
esac
echo "$3 stays down: $why (exit code $1). Mend it, then: s6-svc -u $3 (in the scan directory)"
exit 125
"""

_LOG_RUN = """\
#!/bin/sh
# The log is main/current, with ten older files of 1 MB; T puts the local time before each line.
exec s6-log n10 s1000000 T ./main
"""

_HOLDER_RUN = """\
#!/bin/sh
# Keeps the descriptors of the inco-trio services while they do not run. Stopping it loses what waits in them.
exec s6-fdholder-daemon -1 -i data/rules s
"""

_UNIT = """\
# /etc/systemd/system/{name}.service, written by `inco-trio s6 --systemd`

[Unit]
Description=inco-trio: {of}
# Restarts lose nothing, so there is no number of them at which to give up.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={program}
ExecReload=kill -HUP $MAINPID
Restart=always
RestartSec=1
RestartPreventExitStatus=2 77 78
TimeoutStopSec=10
# The link's socket, the inotify queue and the notes of what is in flight, each twice while it is replaced.
FileDescriptorStoreMax=8
# systemd sets this by itself from version 254 on.
Environment=FDSTORE=8
User={user}
# For the control socket. Other units may have theirs there.
RuntimeDirectory=inco-trio
RuntimeDirectoryPreserve=yes
Environment=XDG_RUNTIME_DIR=%t
{rights}
NoNewPrivileges=yes
# Not strict: a ReadWritePaths= mount does not follow an IRQ directory that is removed and made again.
ProtectSystem=full
DevicePolicy=closed
LockPersonality=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictNamespaces={namespaces}
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""


_CLIENT_UNIT = """\
# /etc/systemd/system/{name}.service, written by `inco-trio s6 --systemd`

[Unit]
Description=inco-trio: {of}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={program}
ExecReload=kill -HUP $MAINPID
Restart=always
RestartSec=1
RestartPreventExitStatus=2 77 78
TimeoutStopSec=10
# That of the proxies: their control sockets obey nobody else.
User={user}
Environment=XDG_RUNTIME_DIR=%t
AmbientCapabilities=
CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
NoNewPrivileges=yes
# It writes no file.
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
LockPersonality=yes
MemoryDenyWriteExecute=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources

[Install]
WantedBy=multi-user.target
"""


_RIGHTS_OF_INTERFACE = """\
# With CAP_NET_ADMIN in both, more frames than net.core.rmem_max allows wait for a proxy that is being restarted.
AmbientCapabilities=CAP_NET_RAW
CapabilityBoundingSet=CAP_NET_RAW
RestrictAddressFamilies=AF_PACKET AF_NETLINK AF_UNIX"""
_RIGHTS_OF_SOCKET = """\
AmbientCapabilities=
CapabilityBoundingSet=
RestrictAddressFamilies=AF_UNIX"""
_RIGHTS_OF_WIRE = """\
AmbientCapabilities=
CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX"""
_RIGHTS_OF_BOARDS = """\
# CAP_NET_RAW is for boards on interfaces. One with a netns needs CAP_SYS_ADMIN too, in both.
AmbientCapabilities=CAP_NET_RAW
CapabilityBoundingSet=CAP_NET_RAW
RestrictAddressFamilies=AF_PACKET AF_NETLINK AF_UNIX"""


def find_program() -> list[str]:
    """The command, with an absolute path, that starts this very inco-trio again."""
    started = Path(sys.argv[0])
    if started.name == "inco-trio":
        try:
            return [str(started.absolute())]
        except OSError as error:
            raise InvalidArgumentError(
                f"{started}: the working directory is gone: start inco-trio by its full path"
            ) from error
    return [sys.executable, "-m", "inco_trio"]


@attrs.frozen
class Client:
    """A service beside the proxies, which asks them; `gateway_service` and `exporter_service` make it."""

    label: str
    """What it is named after."""
    of: str
    """What it does, in words."""
    words: tuple[str, ...]
    """The command and its arguments."""
    warnings: tuple[str, ...] = ()
    """What cannot be read now."""


def gateway_service(url: str, config: Path | None) -> Client:
    """The service of the gateway to the broker at `url`, with the file `config`. Raises InvalidArgumentError."""
    from inco_trio.mqtt.configuration import parse_broker, read_gateway

    words = ("mqtt", url) if config is None else ("mqtt", url, "--config", str(config.absolute()))
    warnings = () if config is None else _warnings(lambda: read_gateway(config))
    return Client(_GATEWAY, f"gateway to {parse_broker(url)}", words, warnings)


def exporter_service(listen: str) -> Client:
    """The service of the exporter, which listens at `listen`."""
    return Client(_EXPORTER, f"metrics at {listen}", ("exporter", "--listen", listen))


@attrs.frozen
class Service:
    """A service for which descriptors are held; `link_service`, `boards_service` and `wire_service` make it."""

    label: str
    """What it, and what is held for it, is named after."""
    of: str
    """What it does, in words."""
    words: tuple[str, ...]
    """The command and its arguments."""
    rights: str
    """The directives of a systemd unit that say what it may do."""
    capability: str
    """The capability that it keeps, as an argument of setpriv(1)."""
    namespaces: str
    """RestrictNamespaces= of a systemd unit."""
    warnings: tuple[str, ...]
    """What cannot be read now."""


def link_service(link: str, config: Path) -> Service:
    """The service of a link, with the registers of the udrv.json `config`. Raises InvalidArgumentError."""
    words = ("run", link, "--config", str(config.absolute()))
    of = f"inter-core interrupts on {link}"
    label, warnings = _label(link), _warnings(lambda: read_udrv(config))
    if isinstance(parse_address(link), UnixAddress):
        return Service(label, of, words, _RIGHTS_OF_SOCKET, "", "yes", warnings)
    return Service(label, of, words, _RIGHTS_OF_INTERFACE, ",+net_raw", "yes", warnings)


def boards_service(directory: Path, label: str) -> Service:
    """The service of all boards of a directory."""
    words = ("run", "--boards", str(directory.absolute()))
    of = f"inter-core interrupts of the boards in {directory}"
    warnings = _warnings(lambda: os.scandir(directory).close())
    return Service(label, of, words, _RIGHTS_OF_BOARDS, ",+net_raw", "net", warnings)


def wire_service(url: str, link: str, end: str, config: Path | None) -> Service:
    """The service of an end of the wire at `url`, with the file `config`. Raises InvalidArgumentError."""
    from inco_trio.mqtt.configuration import parse_broker, read_gateway

    of, words = f"{end} on {parse_broker(url)}", ("mqtt-link", url, "--link", link, "--end", end)
    warnings = () if config is None else _warnings(lambda: read_gateway(config))
    options = () if config is None else ("--config", str(config.absolute()))
    return Service(_WIRE + _label(link), of, (*words, *options), _RIGHTS_OF_WIRE, "", "yes", warnings)


def write_scandir(directory: Path, *, service: Service | Client, user: str | None, program: Sequence[str]) -> list[str]:
    """Make `directory` an s6 scan directory that runs inco-trio as `service`, beside others.

    `user` is who the service runs as, with CAP_NET_RAW at most; None: who runs s6-svscan. `program` is the command
    before its arguments. Only files that differ are written. Returns one line for each of them, and a warning for what
    cannot be read now. Raises InvalidArgumentError, PermissionDeniedError, ResourceError.
    """
    lines = list(service.warnings)
    try:
        _make_directory(directory)
        lines += _write_tree(directory, _service(service, user, program))
        if isinstance(service, Client):
            return lines
        uids, foreign = _service_uids(directory)
        rules = _rules(directory, uids)
        lines += [
            f"warning: {path} is not one that `inco-trio s6` wrote: its service is passed over" for path in foreign
        ]
        lines += _write_tree(directory, _holder(rules))
        lines += _remove_stale_rules(directory, rules)
    except IncoError:
        raise
    except OSError as error:
        # The destination of a rename is what the user knows, not the temporary name.
        subject = f"cannot write {error.filename2 or error.filename}"
        raise from_os_error(error, subject, STRERROR, (_MISPLACED, InvalidArgumentError, STRERROR)) from error
    return lines


def systemd_unit(*, service: Service | Client, user: str | None, program: Sequence[str]) -> str:
    """The text of a systemd unit that runs inco-trio; arguments as for `write_scandir`. Raises InvalidArgumentError."""
    command = [*program, *service.words, "--log-format", "text"]
    if isinstance(service, Client):
        return _CLIENT_UNIT.format(
            name=_SERVICE + service.label,
            of=service.of.replace("%", "%%"),
            program=" ".join(map(_quote_for_systemd, command)),
            user="root" if user is None else _account(user).pw_name,
        )
    return _UNIT.format(
        name=_SERVICE + service.label,
        of=service.of.replace("%", "%%"),
        program=" ".join(map(_quote_for_systemd, command)),
        user="root" if user is None else _account(user).pw_name,
        rights=service.rights,
        namespaces=service.namespaces,
    )


_Tree = dict[str, tuple[str, int]]
"""Path below the scan directory to content and mode."""


def _service(service: Service | Client, user: str | None, program: Sequence[str]) -> _Tree:
    account = None if user is None else _account(user)
    setpriv, holds = "", isinstance(service, Service)
    if account:
        capability = service.capability if isinstance(service, Service) else ""
        setpriv = _SETPRIV.format(user=shlex.quote(account.pw_name), gid=account.pw_gid, capability=capability)
    holder = ("--fd-holder", f"../{_HOLDER}/s") if holds else ()
    command = [*program, *service.words, "--notification-fd", "3", *holder, "--log-format", "text"]
    name = _SERVICE + service.label
    script = _RUN if holds else _RUN_WITHOUT_HOLDER
    run = script.format(holder=_HOLDER, setpriv=setpriv, program=shlex.join(command))
    # The rights in the holder are those of its user.
    uid = {f"{name}/data/uid": (f"{account.pw_uid}\n" if account else "", 0o644)} if holds else {}
    # The logger comes first and run last: s6-svscan may look at any time, and asks for a logger only once.
    return {
        f"{name}/log/run": (_LOG_RUN, 0o755),
        **uid,
        f"{name}/finish": (_FINISH, 0o755),
        f"{name}/notification-fd": ("3\n", 0o644),
        # More than the 5 s that inco-trio allows itself to finish what it has accepted.
        f"{name}/timeout-kill": ("10000\n", 0o644),
        f"{name}/run": (run, 0o755),
    }


def _holder(rules: dict[str, str]) -> _Tree:
    tree = {f"{_HOLDER}/{path}": (f"{content}\n", 0o644) for path, content in rules.items()}
    tree[f"{_HOLDER}/notification-fd"] = ("1\n", 0o644)
    tree[f"{_HOLDER}/run"] = (_HOLDER_RUN, 0o755)
    return tree


def _service_uids(directory: Path) -> tuple[dict[int, list[str]], list[Path]]:
    """The labels of the services of each user, and the files data/uid that are not ours."""
    labels: dict[int, list[str]] = {}
    foreign = []
    for service in sorted(path for path in directory.iterdir() if path.name.startswith(_SERVICE)):
        path = service / "data/uid"
        try:
            path.lstat()
            text = path.read_bytes().strip() if path.is_file() else b"none"  # a FIFO would wait for a writer
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            raise PermissionDeniedError(f"cannot read {path}", error.strerror) from error
        label = service.name.removeprefix(_SERVICE)
        if re.fullmatch(rb"[0-9]{1,10}", text) and "\n" not in label:
            labels.setdefault(int(text), []).append(label)
        elif text:  # Empty for a service without a user of its own: it runs as who runs s6-svscan.
            foreign.append(path)
    return labels, foreign


def _rules(directory: Path, labels: dict[int, list[str]]) -> dict[str, str]:
    """Who may do what with which identifiers: root and the directory's owner all, a service's user store its own."""
    rules = {
        f"data/rules/uid/{uid}/env/S6_FDHOLDER_STORE_REGEX": f"^inco-trio/({'|'.join(map(_quote_for_regex, names))})/"
        for uid, names in labels.items()
    }
    for owner in {0, directory.stat().st_uid}:
        env = f"data/rules/uid/{owner}/env"
        rules |= {
            f"{env}/S6_FDHOLDER_STORE_REGEX": "^inco-trio/",
            f"{env}/S6_FDHOLDER_RETRIEVE_REGEX": "^inco-trio/",
            f"{env}/S6_FDHOLDER_LIST": "yes",
            f"{env}/S6_FDHOLDER_GETDUMP": "yes",
        }
    return rules | {f"{Path(path).parent.parent}/allow": "" for path in rules}


def _write_tree(directory: Path, tree: _Tree) -> list[str]:
    return [line for path, (content, mode) in tree.items() if (line := _write(directory, path, content, mode))]


def _write(directory: Path, name: str, content: str, mode: int) -> str | None:
    path = directory / name
    _make_directory(path.parent)
    exists, data = path.is_file(), os.fsencode(content)
    if exists and stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == data:
        return None
    new = path.with_name(f".{path.name}.new")
    if os.path.lexists(new):
        new.unlink()
    try:
        with new.open("xb") as file:
            file.write(data)
        new.chmod(mode)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # refused in the same way
            new.unlink(missing_ok=True)
        # write(2) knows no name.
        error.filename = error.filename2 = str(path)
        raise
    return f"{'changed' if exists else 'created'} {path}"


def _make_directory(path: Path) -> None:
    """Create `path` and its parents so that the services' users may pass, whatever the umask is."""
    if path.is_dir():
        return
    if path != path.parent:
        _make_directory(path.parent)
    path.mkdir()
    path.chmod(0o755)


def _remove_stale_rules(directory: Path, rules: dict[str, str]) -> list[str]:
    """Take their rights from users that no service runs as any more."""
    wanted = {path.split("/")[3] for path in rules}
    lines = []
    for path in sorted((directory / _HOLDER / "data/rules/uid").iterdir()):
        # A link may lead to a directory, and so give rights; a file gives none, and is none of ours.
        if path.name in wanted or not (path.is_symlink() or path.is_dir()):
            continue
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
        lines.append(f"removed {path}")
    return lines


def _label(interface: str) -> str:
    """What the service of the link is named after. Raises InvalidArgumentError for what cannot be one, or not here."""
    try:
        label = parse_address(interface).label
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"link {interface!r}", error.reason) from None
    if interface.startswith("-"):
        raise InvalidArgumentError(f"link {interface!r}: the service would take it for an option")
    if "\n" in label:
        raise InvalidArgumentError(f"link {interface!r}: a service's name has no line break")
    if label.startswith(_WIRE):
        raise InvalidArgumentError(f"link {interface!r}: {_SERVICE}{_WIRE}... are the services of wires")
    if label in _OURS:
        raise InvalidArgumentError(f"link {interface!r}: {_SERVICE}{label} is the service of {_OURS[label]}")
    return label


def _account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except (KeyError, ValueError):  # ValueError: a NUL, or characters that no name can hold
        raise InvalidArgumentError(f"--user {user}: there is no such user") from None


def _warnings(read: Callable[[], object]) -> tuple[str, ...]:
    try:
        read()
    except (IncoError, OSError) as error:
        return (f"warning: {error}",)
    return ()


def _quote_for_regex(text: str) -> str:
    """`text` as a POSIX extended regular expression; re.escape would escape more than that knows."""
    return re.sub(r"[][.\\()*+?{}|^$]", r"\\\g<0>", text)


def _quote_for_systemd(text: str) -> str:
    """`text` as one word of ExecStart=: "Quoting" in systemd.syntax(7), "Command lines" in systemd.service(5)."""
    text = text.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", text, re.ASCII):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    # A unit is a file of UTF-8 without control characters; C's escapes stand for all other bytes.
    return '"' + re.sub(r"[\0-\x1f\x7f\udc80-\udcff]", _escape, text) + '"'


def _escape(match: re.Match[str]) -> str:
    return f"\\x{os.fsencode(match[0])[0]:02x}"
