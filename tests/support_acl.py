"""Access control lists of files (acl(5))."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from inco_trio.trust import ACL

__all__ = ["add_acl"]


def add_acl(path: Path, uid: int) -> None:
    """Let another user write to a directory, as `setfacl -m u:UID:rwx` does (struct posix_acl_xattr_header)."""
    unnamed = 0xFFFFFFFF
    entries = [(0x01, 7, unnamed), (0x02, 7, uid), (0x04, 5, unnamed), (0x10, 7, unnamed), (0x20, 5, unnamed)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, ACL, value)
