"""Descriptions of the services that `inco-trio service` writes, for s6 and for systemd."""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import resources
from pathlib import Path

import attrs

from inco_trio.board_files import read_boards
from inco_trio.config import Config, read_board, read_udrv
from inco_trio.errors import IncoError, InvalidArgumentError
from inco_trio.links.address import UnixAddress, parse_address
from inco_trio.signals import Direction, Signal

__all__ = [
    "PREFIX",
    "USER",
    "Service",
    "access_warnings",
    "account_of",
    "boards_service",
    "bridge_service",
    "exporter_service",
    "find_program",
    "gateway_service",
    "link_service",
    "reading",
    "template",
]

PREFIX = "inco-trio-"
_GATEWAY, _EXPORTER, _BRIDGE = "mqtt", "exporter", "wire-"
_RESERVED = {"fdholder": "the fd store", _GATEWAY: "the gateway", _EXPORTER: "the exporter"}
"""Labels that a link cannot have, each with the service that uses the label."""
USER = "inco-trio"
"""The system user for services that root sets up."""
_OF_INTERFACES = "CAP_NET_RAW CAP_NET_ADMIN"
_PACKETS = f"""\
AmbientCapabilities={_OF_INTERFACES}
CapabilityBoundingSet={_OF_INTERFACES}
RestrictAddressFamilies=AF_PACKET AF_NETLINK AF_UNIX
IPAddressDeny=any"""
_NO_CAPABILITY = "AmbientCapabilities=\nCapabilityBoundingSet=\n"
_RIGHTS_OF_INTERFACE = f"""\
# CAP_NET_ADMIN lets the receive buffer exceed net.core.rmem_max. The proxy drops it once the buffer is set.
{_PACKETS}"""
_RIGHTS_OF_SOCKET = f"{_NO_CAPABILITY}RestrictAddressFamilies=AF_UNIX\nIPAddressDeny=any\nPrivateNetwork=yes"
_RIGHTS_OF_BRIDGE = f"{_NO_CAPABILITY}RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX"
_RIGHTS_OF_BOARDS = f"""\
# The capabilities are for interfaces. Boards with a network namespace also need CAP_SYS_ADMIN in both lines.
{_PACKETS}"""
_OF_USER = ",+net_raw,+net_admin"
"""The capabilities that `_PACKETS` grants, as an argument for setpriv(1)."""


def find_program() -> list[str]:
    """Return the command that runs this installation of inco-trio.

    A service may have privileges, so -I isolates Python from the user's site directory, PYTHON* variables and the
    current directory. If inco_trio is not importable that way, -P isolates Python only from the current directory.
    """
    isolated = [sys.executable, "-I"]
    found = subprocess.run([*isolated, "-c", "import inco_trio"], cwd="/", stderr=subprocess.DEVNULL, check=False)
    return [*(isolated if found.returncode == 0 else [sys.executable, "-P"]), "-m", "inco_trio"]


@cache
def template(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text()


@attrs.frozen
class Service:
    """The properties of a service that s6 or systemd runs."""

    label: str
    """The name of the service without PREFIX. The service's stored descriptors have the same name."""
    of: str
    """The purpose of the service, as text."""
    words: tuple[str, ...]
    """The inco-trio command and its arguments."""
    warnings: tuple[str, ...] = ()
    """Warnings about configuration files that cannot be read at the moment."""
    rights: str = ""
    """The systemd directives that grant rights, or "" for a client of proxies, which does not use the fd store."""
    capability: str = ""
    """The capabilities to keep, as an argument for setpriv(1)."""
    namespaces: str = "yes"
    """The value of RestrictNamespaces= in a systemd unit."""
    paths: tuple[Path, ...] = ()
    """The known files and directories that the service uses."""
    reads: tuple[Path, ...] = ()
    """The configuration files and directories that the user of the service must be able to read."""
    signals: tuple[Signal, ...] = ()
    """The known signals. The user of the service must be able to use their registers and IRQ directories."""

    @property
    def is_client(self) -> bool:
        """Whether the service connects to proxies instead of running them."""
        return not self.rights


def gateway_service(url: str, config: Path | None) -> Service:
    """Describe the gateway to the broker at `url`, configured by the file `config`. Raises InvalidArgumentError."""
    from inco_trio.mqtt.configuration import parse_broker, read_gateway

    words = ("mqtt", url) if config is None else ("mqtt", url, "--config", str(config.absolute()))
    warnings = () if config is None else _warnings(lambda: read_gateway(config))
    paths = () if config is None else (config.absolute(),)
    return Service(_GATEWAY, f"gateway to {parse_broker(url)}", words, warnings, paths=paths, reads=paths)


def exporter_service(listen: str) -> Service:
    """Describe the exporter that listens on the address `listen`."""
    return Service(_EXPORTER, f"metrics at {listen}", ("exporter", "--listen", listen))


def link_service(link: str, config: Path) -> Service:
    """Describe the proxy of a link, configured by the udrv.json `config`. Raises InvalidArgumentError."""
    config = config.absolute()
    words = ("run", link, "--config", str(config), "--wait-link")
    of, label = f"inter-core interrupts on {link}", _label(link)
    signals: tuple[Signal, ...] = ()
    warnings = _warnings(lambda: read_udrv(config))
    with contextlib.suppress(IncoError):
        signals = read_board(config).signals
    paths = (config, *dict.fromkeys(signal.directory for signal in signals))
    service = Service(label, of, words, warnings, paths=paths, reads=(config,), signals=signals)
    address = parse_address(link)
    if isinstance(address, UnixAddress):
        sockets = (Path(address.local), Path(address.peer))
        return attrs.evolve(service, rights=_RIGHTS_OF_SOCKET, paths=(*paths, *sockets))
    return attrs.evolve(service, rights=_RIGHTS_OF_INTERFACE, capability=_OF_USER)


def boards_service(directory: Path, label: str) -> Service:
    """Describe the proxies of all boards in a directory."""
    directory = directory.absolute()
    words = ("run", "--boards", str(directory))
    of = f"inter-core interrupts of the boards in {directory}"
    paths, namespaces = [directory], "yes"
    signals: list[Signal] = []
    warnings = _warnings(lambda: os.scandir(directory).close())
    with contextlib.suppress(IncoError):
        configs = read_boards(directory).configs.values()
        paths += [path for config in configs for path in _paths_of(config)]
        signals += [signal for config in configs for signal in config.signals]
        if any(config.netns is not None for config in configs):
            namespaces = "net"
    return Service(
        label,
        of,
        words,
        warnings,
        _RIGHTS_OF_BOARDS,
        _OF_USER,
        namespaces,
        tuple(paths),
        reads=(directory,),
        signals=tuple(signals),
    )


def _paths_of(config: Config) -> Iterator[Path]:
    yield from {signal.directory for signal in config.signals}
    if isinstance(config.address, UnixAddress):
        yield from (Path(config.address.local), Path(config.address.peer))


def bridge_service(url: str, link: str, end: str, config: Path | None) -> Service:
    """Describe one side of the bridge over the broker at `url`. Raises InvalidArgumentError."""
    from inco_trio.mqtt.configuration import parse_broker, read_gateway

    of, words = f"{end} on {parse_broker(url)}", ("mqtt-link", url, link, "--end", end)
    warnings = () if config is None else _warnings(lambda: read_gateway(config))
    options = () if config is None else ("--config", str(config.absolute()))
    address = parse_address(link)
    sockets = (Path(address.local), Path(address.peer)) if isinstance(address, UnixAddress) else ()
    reads = () if config is None else (config.absolute(),)
    paths = (*sockets, *reads)
    return Service(
        _BRIDGE + _label(link), of, (*words, *options), warnings, _RIGHTS_OF_BRIDGE, paths=paths, reads=reads
    )


def account_of(user: str) -> pwd.struct_passwd:
    """Return the account of a user. Raises InvalidArgumentError."""
    try:
        return pwd.getpwnam(user)
    except (KeyError, ValueError):  # ValueError: the name contains a NUL or another invalid character
        remedy = f"create it with `useradd --system --user-group {shlex.quote(user)}`, or choose --user root"
        raise InvalidArgumentError(f"--user {user}: no such user ({remedy})") from None


def access_warnings(
    service: Service, user: str | None, program: str | None, *, check_directories: bool = True
) -> Iterator[str]:
    """Yield a warning for each path that the service needs but `user` is not permitted to use. Requires root.

    Do not check the program if it is None. Do not check the IRQ directories and registers if `check_directories` is
    false, because another user owns them.
    """
    if user in (None, "root") or os.geteuid() != 0:
        return
    try:
        account = pwd.getpwnam(user)
    except (KeyError, ValueError):
        return  # A unit may be written before its user is created.
    remedies = dict.fromkeys(service.reads, "change its mode, or move it to a public directory, such as /etc")
    if program is not None:
        remedies[Path(program)] = "write the service with an inco-trio that is installed in /opt/inco-trio"
    for path, remedy in remedies.items():
        if path.exists() and not _may(account, "-r", path):
            above = (*reversed(path.parents), *reversed(path.resolve().parents))
            closed = next((f" or enter {parent}" for parent in above if not _may(account, "-x", parent)), "")
            if path in service.reads and not closed and (share := reading(path, account.pw_uid, account.pw_gid)):
                remedy = f"run as root: {share}"
            yield f"warning: {path}: the user {user} may not read it{closed}, so the service cannot start: {remedy}"
    directories: dict[Path, list[Signal]] = {}
    for signal in service.signals if check_directories else ():
        directories.setdefault(signal.directory, []).append(signal)
    for path, signals in directories.items():
        command = f"install -d -o {user} -g {account.pw_gid} {shlex.quote(str(path))}"
        if not path.exists():
            parent = next(parent for parent in path.parents if parent.exists())
            if not _may(account, "-w", parent):
                yield f"warning: {path}: the user {user} may not create it: run as root at each boot: {command}"
        elif not _may(account, "-w", path):
            yield f"warning: {path}: the user {user} may not write to it: run as root: {command}"
        else:
            yield from _register_warnings(signals, account)


def _register_warnings(signals: Iterable[Signal], account: pwd.struct_passwd) -> Iterator[str]:
    """Yield a warning for each existing register that a user may not use, for example after a trial as root."""
    for signal in signals:
        test, verb = ("-r", "read") if signal.direction is Direction.OUTBOUND else ("-w", "write to")
        with contextlib.suppress(OSError):  # The proxy creates a missing file.
            # Run test(1) only for the files of other users, because a service may have thousands of files.
            if signal.path.stat().st_uid != account.pw_uid and not _may(account, test, signal.path):
                command = f"chown {account.pw_name}: {shlex.quote(str(signal.path))}"
                yield f"warning: {signal.path}: the user {account.pw_name} may not {verb} it: run as root: {command}"


def reading(path: Path, uid: int, gid: int) -> str | None:
    """Return the command that lets a user, whose group is `gid`, read a file or directory.

    Return None if the path was removed or cannot be inspected.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    quoted, bits = shlex.quote(str(path)), "rx" if stat.S_ISDIR(status.st_mode) else "r"
    if status.st_uid == uid:
        return f"chmod u+{bits} {quoted}"
    # A new group would let the user write to the path, or take the path from its present group.
    if status.st_gid != gid and (status.st_mode & stat.S_IWGRP or status.st_gid != 0):
        return f"setfacl -m u:{uid}:{bits} {quoted}"
    return f"chgrp {gid} {quoted} && chmod g+{bits} {quoted}"


def _may(account: pwd.struct_passwd, test: str, path: Path) -> bool:
    """Run test(1) for a path as another user, and return its result. Return True if that is not possible."""
    groups = os.getgrouplist(account.pw_name, account.pw_gid)
    try:
        done = subprocess.run(
            ["test", test, path], user=account.pw_uid, group=account.pw_gid, extra_groups=groups, check=False
        )
    except OSError:  # In a user namespace, root cannot become a user that the namespace does not map.
        return True
    return done.returncode == 0


def _label(link: str) -> str:
    """Return the label of a link's service. Raises InvalidArgumentError if the link cannot have a service."""
    try:
        label = parse_address(link).label
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"link {link!r}", error.reason) from None
    if link.startswith("-"):
        raise InvalidArgumentError(f"link {link!r}: starts with '-', so the service would parse it as an option")
    if "\n" in label:
        raise InvalidArgumentError(f"link {link!r}: contains a line break (invalid in the name of a service)")
    if label.startswith(_BRIDGE):
        raise InvalidArgumentError(f"link {link!r}: names that start with {PREFIX}{_BRIDGE} are reserved for bridges")
    if label in _RESERVED:
        raise InvalidArgumentError(f"link {link!r}: the name {PREFIX}{label} is reserved for {_RESERVED[label]}")
    return label


def _warnings(read: Callable[[], object]) -> tuple[str, ...]:
    try:
        read()
    except (IncoError, OSError) as error:
        return (f"warning: {error}",)
    return ()
