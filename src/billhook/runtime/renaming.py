"""Renames that Python's library lacks: two names exchanged in one step, and a name that is given only where it is free.

Linux has both in renameat2(2), macOS in renamex_np(2); file systems that know neither (network ones) are told apart.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
HERE = -100  # AT_FDCWD of Linux: paths are as they are given
FREE, EXCHANGED = {"linux": (1, 2), "darwin": (4, 2)}.get(sys.platform, (0, 0))


def exchanged(one: Path, other: Path) -> bool:
    """Exchange what two names stand for, at no moment of which either is missing; whether that could be done here.

    Raises:
        OSError: the system refuses these two.
    """
    return _renamed(one, other, EXCHANGED)


def rename_where_free(work: Path, to: Path) -> None:
    """Give a file or folder a name that nothing has.

    Raises:
        FileExistsError: something has it.
        OSError: the system refuses.
    """
    if _renamed(work, to, FREE):
        return
    if not work.is_dir():  # a second name is never given to what is taken, on any file system that has second names
        os.link(work, to, follow_symlinks=False)
        work.unlink()
        return
    if os.path.lexists(to) and not (to.is_dir() and not to.is_symlink() and not any(to.iterdir())):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to))
    work.rename(to)  # a folder takes the place of an empty one alone


def _renamed(one: Path, other: Path, flag: int) -> bool:
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(HERE, names[0], HERE, names[1], flag)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, flag)
    else:
        return False
    code = ctypes.get_errno() if failed else 0
    if code and code not in UNABLE:
        raise OSError(code, os.strerror(code), str(one), None, str(other))
    return not code
