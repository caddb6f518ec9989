"""Write the s6 scan directory for `inco-trio service s6`.

The services refer to each other by relative paths. A scan directory can therefore be copied or moved, and its path may
be longer than a socket address (107 bytes). See https://skarnet.org/software/s6/servicedir.html and, for the rules,
https://skarnet.org/software/s6/s6-fdholderd.html.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from inco_trio.errors import STRERROR, IncoError, InvalidArgumentError, PermissionDeniedError, from_os_error
from inco_trio.linux.files import open_output_directory, replace_output, unlink_if_exists
from inco_trio.service.descriptions import PREFIX, Service, account_of, template
from inco_trio.service.systemd import runtime_directory

__all__ = ["write_scandir"]

_FD_STORE = "inco-trio-fdholder"

_MISPLACED = frozenset({
    errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.EROFS, errno.EINVAL,
})  # fmt: skip
"""Error numbers that indicate that the user has given an unsuitable path."""


def write_scandir(
    directory: Path, *, service: Service, user: str | None, program: Sequence[str], options: Sequence[str] = ()
) -> list[str]:
    """Write `service` to the s6 scan directory `directory`, which may contain other services.

    The service runs `program` with additional `options` as `user`. None and "root" mean the user of s6-svscan; another
    user gets the capabilities that the service needs. Write only changed files. Return a line for each written
    file, and the warnings. Raises InvalidArgumentError, PermissionDeniedError, ResourceError.
    """
    lines = list(service.warnings)
    try:
        with _opened(directory) as scan:
            lines += _write_tree(directory, scan, _service(service, user, program, options))
            if service.is_client:
                return lines
            uids, foreign = _service_uids(directory)
            rules = _rules(os.fstat(scan).st_uid, uids)
            lines += [
                f"warning: {path}: not written by `inco-trio service s6`, so its service may not use the fd store"
                for path in foreign
            ]
            lines += _write_tree(directory, scan, _fd_store(rules))
            lines += _remove_stale_rules(directory, scan, rules)
    except IncoError:
        raise
    except OSError as error:
        # filename2 is the target of a rename. Do not show the name of the temporary file.
        subject = f"cannot write {error.filename2 or error.filename}"
        raise from_os_error(error, subject, STRERROR, (_MISPLACED, InvalidArgumentError, STRERROR)) from error
    return lines


_Tree = dict[str, tuple[str, int]]
"""The content and mode of each file, keyed by its path below the scan directory."""


def _service(service: Service, user: str | None, program: Sequence[str], options: Sequence[str]) -> _Tree:
    account = None if user in (None, "root") else account_of(user)
    held = not service.is_client
    setpriv = ""
    if account:
        setpriv = template("setpriv").format(
            user=shlex.quote(account.pw_name), gid=account.pw_gid, capability=service.capability
        )
    store = ("--fd-holder", f"../{_FD_STORE}/s") if held else ()
    command = [*program, *service.words, *options, "--notification-fd", "3", *store, "--log-format", "text"]
    setup = "ulimit -l unlimited\n" if "--lock-memory" in options else ""
    if account and service.words[0] == "run":
        # Only root may create a directory for the control socket in /run.
        sockets = f"/run/inco-trio/{runtime_directory(service.label)}"
        setup += f"install -d -o {shlex.quote(account.pw_name)} -g {account.pw_gid} {sockets}\n"
        command += ["--control", f"{sockets}/control.sock"]
    name = PREFIX + service.label
    script = template("run-with-fd-store" if held else "run")
    run = script.format(holder=_FD_STORE, setup=setup, setpriv=setpriv, program=shlex.join(command))
    # `_service_uids` reads this file to grant the user rights in the fd store.
    uid = {f"{name}/data/uid": (f"{account.pw_uid}\n" if account else "", 0o644)} if held else {}
    # Write log/run first and run last: s6-svscan may scan at any time, and checks for a logger only once.
    return {
        f"{name}/log/run": (template("log-run"), 0o755),
        **uid,
        f"{name}/finish": (template("finish"), 0o755),
        f"{name}/notification-fd": ("3\n", 0o644),
        # Milliseconds until s6 kills the process. inco-trio finishes accepted notifications within 5 s.
        f"{name}/timeout-kill": ("10000\n", 0o644),
        f"{name}/run": (run, 0o755),
    }


def _fd_store(rules: dict[str, str]) -> _Tree:
    tree = {f"{_FD_STORE}/{path}": (f"{content}\n", 0o644) for path, content in rules.items()}
    tree[f"{_FD_STORE}/notification-fd"] = ("1\n", 0o644)
    tree[f"{_FD_STORE}/run"] = (template("fd-store-run"), 0o755)
    return tree


def _service_uids(directory: Path) -> tuple[dict[int, list[str]], list[Path]]:
    """Return the services' labels, keyed by user ID, and the data/uid files that inco-trio did not write."""
    labels: dict[int, list[str]] = {}
    foreign = []
    for service in sorted(path for path in directory.iterdir() if path.name.startswith(PREFIX)):
        path = service / "data/uid"
        try:
            path.lstat()
            text = path.read_bytes().strip() if path.is_file() else b"none"  # Reading a FIFO would block.
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            raise PermissionDeniedError(f"cannot read {path}: {error.strerror}") from error
        label = service.name.removeprefix(PREFIX)
        if re.fullmatch(rb"[0-9]{1,10}", text) and "\n" not in label:
            labels.setdefault(int(text), []).append(label)
        elif text:  # The file is empty for a service without --user.
            foreign.append(path)
    return labels, foreign


def _rules(scandir_owner: int, labels: dict[int, list[str]]) -> dict[str, str]:
    """Return the fd store's access rules: full access for root and the owner, storing only for a service's user."""
    rules = {
        f"data/rules/uid/{uid}/env/S6_FDHOLDER_STORE_REGEX": f"^inco-trio/({'|'.join(map(_quote_for_regex, names))})/"
        for uid, names in labels.items()
    }
    for owner in {0, scandir_owner}:
        env = f"data/rules/uid/{owner}/env"
        rules |= {
            f"{env}/S6_FDHOLDER_STORE_REGEX": "^inco-trio/",
            f"{env}/S6_FDHOLDER_RETRIEVE_REGEX": "^inco-trio/",
            f"{env}/S6_FDHOLDER_LIST": "yes",
            f"{env}/S6_FDHOLDER_GETDUMP": "yes",
        }
    return rules | {f"{Path(path).parent.parent}/allow": "" for path in rules}


@contextlib.contextmanager
def _opened(path: Path, name: str = "", within: int | None = None) -> Iterator[int]:
    """Open the directory `path / name` while the block runs; create it if it is missing. Raises OSError.

    `within` is the descriptor of `path`. No symlink of another user can lead elsewhere, see `open_output_directory`.
    """
    try:
        fd = open_output_directory(path if within is None else Path(name), within=within, make=True, mode=0o755)
    except OSError as error:
        error.filename = str(path / (error.filename or name))
        raise
    try:
        yield fd
    finally:
        os.close(fd)


def _write_tree(directory: Path, scan: int, tree: _Tree) -> list[str]:
    """Write files below the scan directory `directory`, whose descriptor is `scan`."""
    return [line for name, (content, mode) in tree.items() if (line := _write(directory, scan, name, content, mode))]


def _write(directory: Path, scan: int, name: str, content: str, mode: int) -> str | None:
    path, data = directory / name, os.fsencode(content)
    with _opened(directory, os.path.dirname(name), scan) as parent:  # noqa: PTH120 - `name` is a string
        try:
            before = _read(path.name, parent)
            if before == (data, mode):
                return None
            replace_output(path.name, data, mode, parent)
        except OSError as error:
            # Errors from write(2) do not include the file name, and others include the temporary name.
            error.filename = error.filename2 = str(path)
            raise
    return f"{'created' if before is None else 'changed'} {path}"


def _read(name: str, parent: int) -> tuple[bytes, int] | None:
    """Return the content and the mode of a regular file, or None if there is none. Raises OSError."""
    try:
        if not stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            return None
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
        return file.read(), stat.S_IMODE(os.fstat(fd).st_mode)


def _remove_stale_rules(directory: Path, scan: int, rules: dict[str, str]) -> list[str]:
    """Remove the rules of users that no longer have a service."""
    wanted = {path.split("/")[3] for path in rules}
    place = f"{_FD_STORE}/data/rules/uid"
    lines = []
    with _opened(directory, place, scan) as parent:
        listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
        try:
            with os.scandir(listed) as entries:
                # Only a directory, or a symlink to a directory, can grant rights. inco-trio does not write files here.
                stale = {
                    e.name: e.is_symlink() for e in entries if e.name not in wanted and (e.is_symlink() or e.is_dir())
                }
        finally:
            os.close(listed)
        for name in sorted(stale):
            try:
                if stale[name]:
                    unlink_if_exists(name, parent)
                else:
                    shutil.rmtree(name, dir_fd=parent)
            except OSError as error:
                error.filename = str(directory / place / name)
                raise
            lines.append(f"removed {directory / place / name}")
    return lines


def _quote_for_regex(text: str) -> str:
    """Escape `text` for a POSIX extended regular expression. re.escape() would escape too many characters."""
    return re.sub(r"[][.\\()*+?{}|^$]", r"\\\g<0>", text)
