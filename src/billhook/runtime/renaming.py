"""Renames that Python's library lacks: exchange two names in one step; rename only if the new name is free.

Linux has both in renameat2(2), macOS in renamex_np(2).  On file systems without them (network ones) `exchanged` says
so.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
HERE = -100  # Linux's AT_FDCWD: relative paths start in the working folder
FREE, EXCHANGED = {"linux": (1, 2), "darwin": (4, 2)}.get(sys.platform, (0, 0))


def exchanged(first: Path, second: Path) -> bool:
    """Exchange two files or folders in one step, so that neither name is ever missing.  False if the system cannot.

    Raises:
        OSError: the system refuses to rename these two.
    """
    return _renamed(first, second, EXCHANGED)


def rename_where_free(work: Path, to: Path) -> None:
    """Rename a file or folder to a name that is free.

    Raises:
        FileExistsError: the name is taken.
        OSError: the system refuses to rename.
    """
    if _renamed(work, to, FREE):
        return
    if not work.is_dir():  # a hard link never replaces an existing file
        os.link(work, to, follow_symlinks=False)
        work.unlink()
        return
    if os.path.lexists(to) and not (to.is_dir() and not to.is_symlink() and not any(to.iterdir())):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to))
    work.rename(to)  # a folder replaces only an empty folder


def _renamed(source: Path, target: Path, flag: int) -> bool:
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(source), os.fsencode(target)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(HERE, names[0], HERE, names[1], flag)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, flag)
    else:
        return False
    code = ctypes.get_errno() if failed else 0
    if code and code not in UNABLE:
        raise OSError(code, os.strerror(code), str(source), None, str(target))
    return not code
