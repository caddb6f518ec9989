"""Checks of the services that inco-trio wrote: whether a supervisor runs them, and where their logs are."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import attrs

from inco_trio.doctor.proxies import stopped, value_of
from inco_trio.doctor.register_files import kinds, trusted
from inco_trio.doctor.result import Level, Result, fail, hidden, refused, warn
from inco_trio.doctor.silence import silent
from inco_trio.errors import IncoError, PermissionDeniedError
from inco_trio.links.address import InterfaceAddress, UnixAddress, parse_address
from inco_trio.links.opening import inside
from inco_trio.linux.netns import identity
from inco_trio.linux.processes import (
    Process,
    Processes,
    answered,
    is_stopped,
    named,
    read,
    status_of,
    working_directory,
)
from inco_trio.linux.users import find_owner
from inco_trio.service.descriptions import PREFIX, access_warnings, link_service
from inco_trio.service.rivals import serving, users_of
from inco_trio.signals import Signal
from inco_trio.trust import Trust

__all__ = [
    "FoundService",
    "find_services",
    "leftovers",
    "network_of",
    "services_of",
    "services_of_boards",
    "unanswered",
]

PERMANENT = {str(code) for code in (os.EX_NOPERM, os.EX_CONFIG, 2)}
"""The exit codes after which the `finish` script keeps a service down. Other services that are down were stopped."""
_LASTING = {str(os.EX_NOPERM), "2"}
"""The exit codes after which a start fails again, unless the service or the permissions of its user are changed."""
PATIENCE = 5.0
"""Maximum time in seconds that a command of a supervisor may take."""
FD_STORE = f"{PREFIX}fdholder"
SYSTEMD = "systemd"
"""The name under which results about systemd itself are reported."""
_MEANINGS = {
    "2": "the command line is wrong: write the service again",
    str(os.EX_UNAVAILABLE): "the interface or a program is missing, or another process uses the socket of the link",
    str(os.EX_SOFTWARE): "an internal error, which its log describes",
    str(os.EX_OSERR): "a limit of descriptors, inotify or memory is reached, which its log names",
    str(os.EX_NOPERM): "a capability or permission is missing, which its log names",
    str(os.EX_CONFIG): "the configuration is invalid, or a register or directory cannot be used",
    "126": "a program cannot be executed",
    "127": "a program is missing",
}
"""The meaning of each exit code, with the remedy if there is one."""
_HARM = {
    "s6-supervise": "s6-svc has no effect, and the service is not restarted",
    "s6-svscan": "s6-svscanctl has no effect, and new services are not started",
    "s6-log": "the log is not written",
    "s6-fdholderd": "it stores no descriptors, and no service can start",
}
"""What does not work while a process of s6 is stopped."""

_STORED = re.compile(r"inco-trio/([^/]+)/[^/]+")
"""The name of an entry in the fd store of s6, with the label of its service."""

_Links = tuple[tuple[InterfaceAddress | UnixAddress, Path | None], ...]
"""The addresses of links, each with the network namespace of its interface."""

_Key = tuple[str, tuple[int, int]]
"""The name of a link, and the identity of the network namespace of its interface."""


def _key(address: InterfaceAddress | UnixAddress, netns: Path | None) -> _Key:
    return address.name, (0, 0) if isinstance(address, UnixAddress) else identity(netns)


@attrs.frozen
class FoundService:
    """A service of s6 or systemd, with the results of its checks."""

    name: str
    """The name of the service directory, or the name of the unit without `.service`."""
    directory: Path | None = None
    """The service directory of s6."""
    links: _Links = ()
    """The links that the service serves, as far as they are known."""
    boards: Path | None = None
    """The directory of the boards that the service serves."""
    results: tuple[Result, ...] = ()

    @property
    def is_fd_store(self) -> bool:
        return self.name == FD_STORE

    @property
    def fix(self) -> str | None:
        """The first command to run, or None if the service has no problem or no command fixes it."""
        return next((result.fix for result in self.results if result.fix is not None), None)


def find_services(processes: Processes, root: Path = Path("/")) -> list[FoundService]:
    """Return the services of s6 and systemd whose names begin with PREFIX."""
    found = list(_of_s6(processes, root))
    if (root / "run/systemd/system").is_dir():
        found += _of_systemd()
    # Services that are up can serve a link that does not exist yet.
    is_up = [down is None or down.again is not None for _, down in found]
    offered = {_key(*link) for (service, _), up in zip(found, is_up, strict=True) if up for link in service.links}
    return [_judged(service, down, processes, offered) for service, down in found]


def _judged(service: FoundService, down: _Down | None, processes: Processes, offered: set[_Key]) -> FoundService:
    """Return a service with the result for it if it is down. Add its links to `offered`."""
    if down is not None:
        service = attrs.evolve(service, results=(*service.results, _verdict(down, processes, offered)))
    offered |= {_key(*link) for link in service.links}
    return service


def services_of(link: str, services: Iterable[FoundService], netns: Path | None = None) -> list[FoundService]:
    """Return the services that serve a link, after the fd stores that they use.

    `netns` is the network namespace of the interface (default: that of this thread).
    """
    label, services = parse_address(link).label, tuple(services)
    return _with_stores([each for each in services if _serves(each, label, netns)], services)


def unanswered(services: Iterable[FoundService]) -> Iterator[Result]:
    """Yield the warning that systemd did not list its units."""
    yield from (result for service in services if service.name == SYSTEMD for result in service.results)


def services_of_boards(directory: Path, services: Iterable[FoundService]) -> list[FoundService]:
    """Return the services that serve a directory of boards, after the fd stores that they use."""
    services = tuple(services)
    return _with_stores([each for each in services if each.boards and _is_same(each.boards, directory)], services)


def _is_same(path: Path, other: Path) -> bool:
    """Return whether two paths lead to the same directory."""
    if path == other:
        return True
    is_silent = silent("configuration", path, partial(os.path.realpath, path)) is not None
    return not is_silent and os.path.realpath(path) == os.path.realpath(other)


def _with_stores(own: Sequence[FoundService], services: Sequence[FoundService]) -> list[FoundService]:
    """Return services after the fd stores that they use."""
    places = {each.directory.parent for each in own if each.directory is not None}
    stores = [each for each in services if each.is_fd_store and each.directory and each.directory.parent in places]
    return [*stores, *own]


def _serves(service: FoundService, label: str, netns: Path | None) -> bool:
    if not service.links:
        return service.name == f"{PREFIX}{label}"
    wanted = identity(netns)
    # Interfaces in different network namespaces can have the same name.
    return any(
        address.label == label and (isinstance(address, UnixAddress) or identity(place) == wanted)
        for address, place in service.links
    )


def leftovers(
    services: Iterable[FoundService], processes: Processes, label: str | None = None, options: Sequence[str] = ()
) -> Iterator[Result]:
    """Check that each descriptor in the fd stores of s6 belongs to a service. With a label, check only its service.

    `options` contains the arguments with which `inco-trio service s6 SCANDIR` writes this service.
    """
    services = tuple(services)
    for store in services:
        if not store.is_fd_store or store.directory is None:
            continue
        path = store.directory / "s"
        found: dict[str, list[str]] = {}
        try:
            listed = _output("s6-fdholder-list", str(path)) or ""
        except subprocess.TimeoutExpired:
            holders = [each.pid for each in processes.all if each.is_holder and is_stopped(each.pid)]
            own = [pid for pid in holders if working_directory(pid) == store.directory]
            effect = "notifications of removed services may be stored there but are not shown"
            fix = f"kill -CONT {own[0]}" if own else None
            yield _unanswered("descriptors", path, "s6-fdholder-list", effect, fix)
            continue
        for entry in listed.splitlines():
            if match := _STORED.fullmatch(entry):
                found.setdefault(match[1], []).append(entry)
        if _is_shared(store.directory, found, processes):
            continue
        # A service directory can have another name than `inco-trio service` gives it.
        served = {address.label for each in services if each.boards is None for address, _ in each.links}
        for owner, entries in found.items():
            if label not in (None, owner) or owner in served:
                continue
            if not os.path.lexists(store.directory.with_name(f"{PREFIX}{owner}")):
                scandir = str(store.directory.parent)
                link = owner if Path("/sys/class/net", owner).exists() else "LINK"
                unknown: Sequence[str] = (link, "--config", "FILE")
                if owner.startswith("boards-"):
                    unknown = ("--boards", "DIR")
                elif owner.startswith("wire-"):
                    unknown = ("LINK", "--mqtt-link", "URL", "--end", "CORE")
                write = shlex.join(["inco-trio", "service", "s6", scandir, *(options or unknown)])
                text = f"keeps {len(entries)} descriptors of {PREFIX}{owner}, a service that was removed, with its"
                text += " notifications: to deliver and send them, write the service again: "
                text += f"`{write} && {shlex.join(['s6-svscanctl', '-a', scandir])}`, with the options that it had; "
                text += "this command discards them"
                delete = f's6-fdholder-delete {shlex.quote(str(path))} "$id"'
                yield warn("descriptors", path, text, f"for id in {shlex.join(entries)}; do {delete}; done")


def _is_shared(store: Path, labels: Collection[str], processes: Processes) -> bool:
    """Return whether an fd store may have users that are not the services named after the stored `labels`.

    Such a user is a process without a supervisor, or a service of s6 whose directory has another name. Its descriptors
    cannot be distinguished from those of a removed service.
    """
    places = {each.pid: working_directory(each.pid) for each in processes.all}
    in_store = [each for each in processes.all if places[each.pid] == store]
    holders = [each for each in in_store if each.is_holder and not each.hidden]
    if not holders:
        return True
    # The holder can inherit a socket as its output, as all services of the scan directory can.
    inherited = {inode for each in in_store if not each.is_holder for inode in each.sockets}
    kept = {inode for each in holders for inode in each.sockets} - inherited
    own = {store.with_name(f"{PREFIX}{label}") for label in labels}
    users = [
        each
        for each in processes.all
        if places[each.pid] != store
        and (each.sockets & kept or (each.hidden and value_of("--fd-holder", each.command)))
    ]
    return any(places[each.pid] not in own for each in users) or any(
        "--fd-holder" in (read(script) or "")
        for script in store.parent.glob("*/run")
        if not script.parent.name.startswith(PREFIX) and script.is_file()
    )


def network_of(process: Process) -> Path | None:
    """Return the network namespace of a process, or None if it is unknown or the same as this thread's."""
    place, unknown = Path(f"/proc/{process.pid}"), (0, 0)
    path = place / "ns/net"
    return path if answered(place, lambda: identity(path), unknown) not in (identity(None), unknown) else None


@attrs.frozen
class _Down:
    """A service that does not run."""

    subject: object
    text: str
    """What is wrong, and where the log is."""
    words: tuple[str, ...]
    """The arguments of `inco-trio run`, or () if the service runs another command."""
    links: _Links
    start: str
    """The command that starts the service."""
    remove: str | None
    """The command that removes the service for good once it is stopped."""
    again: str | None = None
    """The command that stops the service if its supervisor starts it again by itself."""
    code: str = ""
    """The exit code of its last process."""
    user: str | None = None
    """The user of the service, or None if it is the user of the supervisor."""

    @property
    def supervisor(self) -> str:
        return "systemd" if self.start.startswith("systemctl") else "s6"


_Found = tuple[FoundService, _Down | None]
"""A service, and what is known about it if it is down."""


@attrs.define
class _Directory:
    """A service directory of s6."""

    path: Path
    supervisor: Process | None = None
    """The s6-supervise of the service, or None if none runs."""
    scanner: Process | None = None
    """The s6-svscan of the scan directory that contains the service."""
    scandir: Path | None = None
    is_symlink: bool = False
    """Whether the scan directory contains only a symlink to the service directory, as with s6-rc."""


def _of_s6(processes: Processes, root: Path) -> Iterator[_Found]:
    places = {each.pid: place for each in processes.all if (place := working_directory(each.pid, root)) is not None}
    found: dict[Path, _Directory] = {}
    # Any user can give a process the name s6-supervise, and choose its working directory.
    trusted = [process for process in processes.all if _is_trusted(process)]
    # The service directory is the working directory of its s6-supervise.
    supervisors = {places[each.pid]: each for each in trusted if each.name == "s6-supervise" and each.pid in places}
    hanging: set[Path] = set()
    for process in trusted:
        if process.name != "s6-supervise":
            continue
        if (place := places.get(process.pid)) is None:
            if (name := process.command[-1]).startswith(PREFIX) and "/" not in name:
                yield FoundService(name, results=(hidden(f"the state of the service {name}"),)), None
        elif place.name.startswith(PREFIX):
            if silence := silent("service", place, partial(_probe, process, place, root)):
                hanging.add(place)
                yield FoundService(place.name, place, results=(silence,)), None
            elif _probe(process, place, root):
                found[place] = _Directory(place, process)
    for process in trusted:
        place = places.get(process.pid)
        if process.name != "s6-svscan" or place is None or silent("service", place, partial(_services_in, place)):
            continue
        for path in _services_in(place) if _probe(process, place, root) else []:
            if (real := path.resolve()) in hanging:
                continue
            # A symlink can lead to a directory with another name.
            directory = found.setdefault(real, _Directory(real, supervisors.get(real)))
            directory.scanner, directory.scandir, directory.is_symlink = process, place, path.is_symlink()
    for path in sorted(found):
        made, running = (
            _service_of_s6(found[path], places, processes, root),
            found[path].supervisor or found[path].scanner,
        )
        # If the process has ended, `made` may contain the network namespace of this thread.
        if running is not None and _probe(running, places[running.pid], root):
            yield made


def _is_trusted(process: Process) -> bool:
    return process.uid in (0, os.geteuid())


def _probe(process: Process, place: Path, root: Path) -> bool:
    """Return whether the working directory of a process still exists and is visible in this mount namespace."""
    try:
        _command_of(place / "run")
        return (root / f"proc/{process.pid}/cwd").samefile(place)
    except OSError:
        return False


def _services_in(scandir: Path) -> list[Path]:
    return [path for path in sorted(scandir.glob(f"{PREFIX}*")) if (path / "run").is_file()]


def _service_of_s6(directory: _Directory, places: Mapping[int, Path], processes: Processes, root: Path) -> _Found:
    words = _command_of(directory.path / "run")
    links = _links_of(words, directory.supervisor or directory.scanner)
    results: list[Result] = []
    if directory.scanner is not None and is_stopped(directory.scanner.pid, root):
        results.append(_stopped(places[directory.scanner.pid], directory.scanner, (), places))
    own = _processes_of(directory.path, places, processes, root)
    for each in own:
        if is_stopped(each.pid, root):
            results += list(stopped(each)) if each.is_proxy else [_stopped(directory.path, each, own, places)]
    down = None
    if directory.supervisor is None or not is_stopped(directory.supervisor.pid, root):
        state = _state_of_s6(directory, words, links)
        if isinstance(state, Result):
            results.append(state)
        else:
            down = state
    return FoundService(directory.path.name, directory.path, links, _boards_of(words), tuple(results)), down


def _processes_of(directory: Path, places: Mapping[int, Path], processes: Processes, root: Path) -> list[Process]:
    """Return the processes of a service of s6. Any user can start other processes in its directory."""
    near = [each for each in processes.all if places.get(each.pid) in (directory, directory / "log")]
    supervisors = {str(each.pid) for each in near if each.name == "s6-supervise" and _is_trusted(each)}
    return [
        each
        for each in near
        if (_is_trusted(each) and (each.is_proxy or each.name in _HARM))
        or status_of(root / f"proc/{each.pid}").get("PPid", "").strip() in supervisors
    ]


def _stopped(directory: Path, process: Process, own: Iterable[Process], places: Mapping[int, Path]) -> Result:
    """Return the result for a stopped process of s6. `own` contains the processes of the service."""
    harm = _HARM.get(process.name, "the service waits for it")
    text = f"process {named([process])} is stopped by a signal or a debugger: {harm}"
    # A killed process has no command line until its s6-supervise has noticed its end.
    others = [each for each in own if places[each.pid] == directory and each is not process and any(each.command)]
    is_harmless = process.name in ("s6-svscan", "s6-log") or places[process.pid] != directory
    is_harmless = is_harmless or (process.name == "s6-supervise" and bool(others))
    return (warn if is_harmless else fail)("service", directory, text, f"kill -CONT {process.pid}")


def _state_of_s6(directory: _Directory, words: tuple[str, ...], links: _Links) -> _Down | Result | None:
    """Return what is known about a service that is down, or None if the service is up."""
    path, quoted = directory.path, shlex.quote(str(directory.path))
    log = f": its log is {path}/log/main/current" if (path / "log").is_dir() else ""
    scandir = shlex.quote(str(directory.scandir))
    is_plain = directory.scandir is not None and not directory.is_symlink
    remove = f"rm -r {quoted} && s6-svscanctl -an {scandir}" if is_plain else None
    if directory.supervisor is None:
        text = f"no s6-supervise runs for this service{log}"
        return _Down(path, text, words, links, f"s6-svscanctl -a {scandir}", remove)
    try:
        answer = _output("s6-svstat", "-o", "up,wantedup,normallyup,exitcode,signum", str(path))
    except subprocess.TimeoutExpired:
        return _unanswered("service", path, "s6-svstat", "it is unknown whether the service is up")
    if answer is None:
        return hidden(f"the state of the service {path}")
    up, wanted, normally, code, number = answer.split()
    if up == "true":
        return None
    reason = f"its process was killed by {_signal(int(number))}" if int(number) > 0 else f"its exit code was {code}"
    code = "" if int(number) > 0 else code
    reason += f": {_MEANINGS[code]}" if code in _MEANINGS else ""
    if normally != "true":
        reason += f", and {path}/down exists"
    text = f"the service is down ({reason}){log}"
    again = f"s6-svc -d {quoted}" if wanted == "true" else None
    return _Down(path, text, words, links, f"s6-svc -u {quoted}", remove, again, code, _user_of(path))


def _user_of(directory: Path) -> str | None:
    """Return the user of a service of s6, or None if it is the user of s6-svscan."""
    with contextlib.suppress(KeyError, ValueError):
        return pwd.getpwuid(int(read(directory / "data/uid") or "")).pw_name
    return None


def _of_systemd() -> Iterator[_Found]:
    properties = "Id,ActiveState,SubState,FreezerState,Result,ExecMainStatus,ExecStart,User"
    try:
        answer = _output("systemctl", "show", f"--property={properties}", f"{PREFIX}*.service")
    except subprocess.TimeoutExpired:
        silence = _unanswered("service", SYSTEMD, "systemctl", f"the units {PREFIX}*.service are not shown")
        yield FoundService(SYSTEMD, results=(silence,)), None
        return
    for block in (answer or "").split("\n\n"):
        unit = dict(line.partition("=")[::2] for line in block.splitlines())
        if "Id" not in unit:
            continue
        name, state = shlex.quote(unit["Id"]), unit.get("ActiveState")
        # For example: { path=/usr/bin/inco-trio ; argv[]=/usr/bin/inco-trio run rpmsg4000 ; ignore_errors=no ; ... }
        words = _arguments(unit.get("ExecStart", "").partition("argv[]=")[2].partition(" ;")[0].split())
        links, results, down = _links_of(words, None), list[Result](), None
        if unit.get("FreezerState") in ("frozen", "freezing"):
            text = "the unit is frozen: its process neither delivers nor sends notifications"
            results.append(fail("service", unit["Id"], text, f"systemctl thaw {name}"))
        again = f"systemctl stop {name}" if unit.get("SubState") == "auto-restart" else None
        if state in ("failed", "inactive") or again is not None:
            code = unit["ExecMainStatus"] if unit["Result"] == "exit-code" else ""
            reason = f"{unit['Result']}, exit status {unit['ExecMainStatus']}"
            reason += f": {_MEANINGS[code]}" if code in _MEANINGS else ""
            text = f"the service is {state} ({reason}): its log is `journalctl -u {name}`"
            start, remove = f"systemctl start {name}", f"systemctl disable {name}"
            code, user = (code if state == "failed" else ""), unit.get("User") or None
            down = _Down(unit["Id"], text, words, links, start, remove, again, code, user)
        service = FoundService(unit["Id"].removesuffix(".service"), None, links, _boards_of(words), tuple(results))
        yield service, down


def _verdict(down: _Down, processes: Processes, offered: set[_Key]) -> Result:
    """Return the result for a service that is down. `offered` contains the links of services that can be started."""
    served: dict[str, list[Process]] = {}
    holders: list[Process] = []
    for address, netns in down.links:
        with contextlib.suppress(IncoError), inside(netns, address.name):
            if found := serving(address, processes):
                served[address.name] = found
                holders += [
                    each
                    for each in users_of(address, processes).holders
                    if not any(each.sockets & proxy.sockets for proxy in found)
                ]
    is_offered = any(_key(*link) in offered for link in down.links)
    if down.code in PERMANENT and (obstacle := _obstacle(down)) is not None:
        problem, fix = obstacle
        if fix and down.code in _LASTING and not served and not is_offered:
            fix += f" && {down.start}"
        return fail("service", down.subject, f"{down.text}; {problem}", fix)
    if served:
        return _superseded(down, served, list({each.pid: each for each in holders}.values()))
    if down.again is not None:
        return fail("service", down.subject, f"{down.text}; {down.supervisor} starts it again")
    if is_offered:
        text = f"{down.text}; another service serves the same link: start only one of them"
        return fail("service", down.subject, text)
    is_needed = bool(down.links) or down.code in PERMANENT or str(down.subject).endswith(f"/{FD_STORE}")
    start = None if down.code in _LASTING else down.start
    return (fail if is_needed else warn)("service", down.subject, down.text, start)


def _superseded(down: _Down, served: dict[str, list[Process]], holders: Sequence[Process]) -> Result:
    """Return the result for a service of which other processes serve a link: a start would cause duplicates."""
    proxies = {each.pid: each for found in served.values() for each in found}.values()
    everyone = ", ".join(f"process {each.pid} ({each.name}) {each.supervision}" for each in proxies)
    several = len(down.links) > 1
    text = f"{down.text}; {everyone} serves {', '.join(served) if several else 'its link'}"
    kept = f"; the service delivers again what process {named(holders)} keeps" if holders else ""
    if not any(each.supervised or each.serves_boards for each in proxies):
        if down.code in _LASTING:
            return warn("service", down.subject, f"{text}: end that process only once the service can start{kept}")
        then = f"{down.supervisor} then starts the service" if down.again is not None else f"then run `{down.start}`"
        text = f"{text}: end that process first, {then}{kept}"
        return warn("service", down.subject, text, f"kill {' '.join(str(each.pid) for each in proxies)}")
    if len(served) < len(down.links):
        text = f"{text}, so do not start both: first stop that process, or remove these boards from one of them"
        return fail("service", down.subject, text)
    if down.again is not None:
        return warn("service", down.subject, f"{text}, so stop this service", down.again)
    if not all(each.supervised for each in proxies):
        # No supervisor restarts such a process: the link may still need this service.
        return warn("service", down.subject, f"{text}, so do not start this service while it runs{kept}")
    text = f"{text}, so remove this service unless you still need it{kept}"
    return warn("service", down.subject, text, down.remove)


def _obstacle(down: _Down) -> tuple[str, str | None] | None:
    """Return the first reason why the proxy of a service cannot start, and the command that fixes it if there is one.

    Return None if the configuration and its registers are fit. A directory of boards is not examined.
    """
    config, owner = value_of("--config", down.words), value_of("--irq-owner", down.words)
    link = _link_of(down.words)
    if config is None or link is None:
        return None
    from inco_trio.config import read_board

    path = Path(config)
    if silent("configuration", path, lambda: read_board(path)) is not None:
        return None
    try:
        signals = read_board(path).signals
        service = link_service(link, path)
    except PermissionDeniedError:
        return None
    except IncoError as error:
        return str(refused(path, error)[0]), f"inco-trio check --config {shlex.quote(config)}"
    trust = Trust()
    with contextlib.suppress(KeyError, ValueError):  # There is no such user.
        trust = Trust(
            *((None, None) if owner is None else find_owner(owner)),
            trust.user if down.user is None else pwd.getpwnam(down.user).pw_uid,
        )
    for directory in dict.fromkeys(each.directory for each in signals):
        own = [each for each in signals if each.directory == directory]
        check = partial(_unfit, directory, own, trust)
        if (result := silent("directory", directory, check) or check()) is not None:
            return f"{result.subject}: {result.found}", result.fix
    for line in access_warnings(service, down.user, None, check_directories=owner is None):
        text, _, command = line.removeprefix("warning: ").partition(": run as root")
        return text, command.partition(": ")[2] or None
    return None


def _unfit(directory: Path, signals: Sequence[Signal], trust: Trust) -> Result | None:
    """Return the first problem of an IRQ directory and its registers, or None."""
    results = (*trusted(directory, trust), *kinds(signals, access=False))
    return next((result for result in results if result.level is not Level.OK), None)


def _command_of(script: Path) -> tuple[str, ...]:
    """Return the arguments of `inco-trio run` in the `run` script of a service, or () if it runs another command."""
    # Reading a FIFO would block.
    text = (read(script) or "").replace("\\\n", " ") if script.is_file() else ""
    try:
        return _arguments(shlex.split(text, comments=True))
    except ValueError:
        return ()


def _arguments(words: Sequence[str]) -> tuple[str, ...]:
    for index, (word, following) in enumerate(pairwise(words)):
        # The name of a user or directory may also be inco-trio.
        if following == "run" and os.path.basename(word) in ("inco-trio", "inco_trio"):  # noqa: PTH119
            return tuple(words[index + 2 :])
    return ()


def _boards_of(words: Sequence[str]) -> Path | None:
    boards = value_of("--boards", words)
    return None if boards is None else Path(boards)


def _links_of(words: Sequence[str], supervisor: Process | None) -> _Links:
    """Return the links in the command of a service, in the network namespace of its supervisor."""
    netns = None if supervisor is None else network_of(supervisor)
    if (boards := _boards_of(words)) is not None:
        from inco_trio.board_files import read_boards

        if silent("configuration", boards, lambda: read_boards(boards)) is not None:
            return ()
        with contextlib.suppress(IncoError):
            return tuple((each.address, each.netns or netns) for each in read_boards(boards).configs.values())
    elif (link := _link_of(words)) is not None:
        with contextlib.suppress(IncoError):
            return ((parse_address(link), netns),)
    return ()


def _link_of(words: Sequence[str]) -> str | None:
    """Return the link in the arguments of `inco-trio run`, or None. A word after an option may be its value."""
    for before, word in pairwise(["", *words]):
        if not word.startswith("-") and (not before.startswith("-") or "=" in before):
            return word
    return None


def _unanswered(check: str, subject: object, program: str, effect: str, fix: str | None = None) -> Result:
    """Return the warning for a supervisor's program that timed out. `effect` says what remains unknown."""
    text = f"{program} got no answer within {PATIENCE:g} s, so {effect}"
    return warn(check, subject, text if fix else f"{text}: repeat the check once the host is less busy", fix)


def _output(*command: str) -> str | None:
    """Return the output of a command, or None if it fails or is missing. Raises subprocess.TimeoutExpired."""
    if (program := shutil.which(command[0])) is None:
        return None
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=PATIENCE, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
