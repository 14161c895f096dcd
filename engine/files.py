"""Files that are whole or not there, places that one process writes to, JSON whose errors name the
file, and texts on one line."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic(path):
    """Yields a path beside `path` to write to; where the block ends, it takes the place of `path`.

    Where the block fails, `path` stays as it was, and nothing is left beside it. Makes the folders
    that are missing. Raises OSError, which names `path`, where it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        yield part
        if part.is_dir():
            remove(path)
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or one_line(error)}") from None
    finally:
        remove(part)


def write_text(path, text):
    """A text as a UTF-8 file; of a file's name that is not UTF-8, what is not is escaped. Raises
    OSError, as `atomic` does."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, value):
    """A value as an indented UTF-8 JSON file. Raises OSError, as `atomic` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def append_line(path, value):
    """Adds a value to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


@contextmanager
def alone(lock, place):
    """Within, this process is the only one that writes to `place`, by a lock on the file `lock`.

    The system lets go of it when a process ends, even by a kill. Makes the lock's folder; leaves
    neither the file nor folders that are still empty. Raises ValueError where another process has
    the lock, or the folder cannot be written to.
    """
    check_folder(lock.parent)
    made = [folder for folder in lock.parents if not folder.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "ab") as file:
        if not locked(file):
            raise ValueError(
                f"--out {place} is in use: another process writes there, wanted its end, or "
                "another --out"
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            for folder in made:
                if not any(folder.iterdir()):
                    folder.rmdir()


def locked(file):
    """Whether an open file is there and could be locked; True where the system has no locks."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))
    except (BlockingIOError, FileNotFoundError):  # the latter: another process has just ended
        return False
    except OSError:
        return True


def read_lines(path):
    """The objects in a file of JSON lines; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def remove(path):
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def check_writable(path, flag="--out"):
    """Raises ValueError where a file cannot be written. Tries it beside `path`; leaves nothing."""
    path = Path(os.path.abspath(path))
    folder = next(folder for folder in path.parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as trial:
            place = Path(trial) / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_name(f".part-{path.name}").touch()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written in {folder}: {error.strerror}") from None


def check_folder(path, flag="--out"):
    """Raises ValueError where a folder cannot be made or written to. Leaves nothing."""
    place = Path(os.path.abspath(path))
    there = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=there):
            pass
    except OSError as error:
        wanted = "wanted a folder that can be written to"
        raise ValueError(f"{flag} is {path}, {wanted}: {error.strerror}") from None


def check_fetched(path):
    """Raises ValueError for a file that cannot be read because git-lfs has not fetched it."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file itself: `git lfs pull` fetches it"
            )


def read_json(path, key=None):
    """The object in a JSON file, or that under `key` of it. Raises ValueError, naming the file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        found = found[key] if key else found
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        check_fetched(path)
        raise ValueError(
            f"{path} cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, wanted an object")
    return found


def shorten(names):
    """At most 20 of the names, and how many more there are."""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return one_line(", ".join(names[:20])) + more


def one_line(error):
    """A text, or what an error says (its name where it says nothing), without line breaks."""
    text = " ".join(str(error).split())
    return text or (type(error).__name__ if isinstance(error, Exception) else "")
