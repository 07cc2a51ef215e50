"""Files that are whole at every moment, and files that one process holds."""
import contextlib
import os
import weakref
from pathlib import Path

from common.errors import RunError

try:
    import fcntl
except ImportError:                     # Windows: nothing is locked
    fcntl = None


@contextlib.contextmanager
def whole(path: Path):
    """Yield a temporary path; rename it to `path` on success. Raises RunError naming `path`."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise RunError(f"{path} is no regular file: it stays as it is")
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, path)
    except BaseException as fault:
        new.unlink(missing_ok=True)
        if not isinstance(fault, OSError):
            raise
        raise RunError(f"{path} could not be written: {fault.strerror or fault}") from None


def write_atomic(path: Path, text: str):
    """Write a text file that is whole at every moment."""
    with whole(path) as new:
        new.write_text(text, encoding="utf-8")


def lock(path: Path, mode: str = "w"):
    """Return the file opened and locked. Raises RunError if another process holds it."""
    file = open(path, mode)
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{path.parent}: another run is writing there; choose another folder "
                           "or wait for its end") from None
        except OSError:                                         # a disk without locks
            pass
        held = weakref.ref(file)                                # workers may outlive us
        os.register_at_fork(after_in_child=lambda: held() and held().close())
    return file
