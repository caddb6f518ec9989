"""Users and groups: passwd(5), group(5)."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["find_owner", "is_private_group", "user_name"]

ID_MAX = (1 << 32) - 2
"""The highest user or group ID. For chown(2), the next number means "no change"."""
FRESH = 10.0
"""Seconds for which `is_private_group` keeps an answer."""
_found: dict[tuple[int, int], tuple[float, bool]] = {}
"""The answers of `is_private_group` with their times, by the IDs of the group and of the user."""
# The modules pwd and grp are imported where they are used, because most starts do not need them.


def user_name(uid: int) -> str:
    """Return the name and the ID of a user, for messages."""
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def find_owner(text: str) -> tuple[int | None, int | None]:
    """Return the user ID and the group ID of `USER[:GROUP]` or `:GROUP`, as in chown(1). Raises ValueError."""
    import grp
    import pwd

    user, _, group = text.partition(":")
    try:
        uid = _find_id(user, lambda name: pwd.getpwnam(name).pw_uid)
        gid = _find_id(group, lambda name: grp.getgrnam(name).gr_gid)
    except KeyError:
        raise ValueError(f"{text!r}: no such user or group") from None
    if uid is None and gid is None:
        raise ValueError(f"{text!r}: expected USER, USER:GROUP or :GROUP")
    return uid, gid


def _find_id(text: str, search: Callable[[str], int]) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()):
        return search(text)
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(ID_MAX)) or int(digits) > ID_MAX:
        raise KeyError(text)
    return int(digits)


def is_private_group(gid: int, uid: int) -> bool:
    """Return whether a group has the name of the user and no other members (useradd(8), USERGROUPS_ENAB).

    A user whose primary group it is counts as a member. The file group(5) does not list these users.
    The answer may be as old as FRESH: the databases may be on the network (nsswitch.conf(5)), so each search can block.
    """
    now = time.monotonic()
    found = _found.get((gid, uid))
    if found is None or now - found[0] > FRESH:
        found = _found[gid, uid] = (now, _search(gid, uid))
    return found[1]


def _search(gid: int, uid: int) -> bool:
    import grp
    import pwd

    try:
        group, name = grp.getgrgid(gid), pwd.getpwuid(uid).pw_name
    except KeyError:
        return False
    if group.gr_name != name or not {*group.gr_mem} <= {name}:
        return False
    return all(user.pw_gid != gid or user.pw_uid == uid for user in pwd.getpwall())
