"""The index of a folder of videos: a JSONL file with a row a line, read by both data tools."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from engine.files import write_text

REJECTED = ("line", "video", "reason")  # what a line of rejected*.jsonl has


@dataclass
class Index:
    """The rows of an index by their line, from 1."""

    rows: dict[int, tuple]  # the values of the fields that were asked for, and the window or None
    rejected: dict[int, tuple[str | None, str]]  # for the rest: its video, and the reason
    digest: str  # the file's SHA-256

    def lines(self):
        return sorted(self.rows | self.rejected)

    def row(self, line):
        """A line's values. Raises ValueError, with the reason, where it was rejected."""
        if line in self.rejected:
            _, reason = self.rejected[line]
            raise ValueError(reason)
        return self.rows[line]

    def video(self, line):
        """The name of a line's video; None where the line does not say."""
        return (self.rows.get(line) or self.rejected[line])[0]


def read_index(path, fields):
    """A JSONL file -> Index. A row that repeats an earlier one is rejected.

    Raises ValueError where it is a folder or empty, FileNotFoundError where it is missing.
    """
    path, wanted = Path(path), "wanted a file with a row a line"
    if not path.exists():
        raise FileNotFoundError(f"--index {path} does not exist, {wanted}")
    if path.is_dir():
        raise ValueError(f"--index {path} is a folder, {wanted}")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"--index {path} is empty, {wanted}")
    rows, rejected, first = {}, {}, {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            row = read_row(line, fields)
        except ValueError as error:
            rejected[number] = None, str(error)
            continue
        if first.setdefault(row, number) == number:
            rows[number] = row
        else:
            rejected[number] = row[0], f"row repeats line {first[row]}"
    return Index(rows, rejected, hashlib.sha256(data).hexdigest())


def has_field(path, name):
    """Whether a line of a JSONL file is an object with that field."""

    def named(line):
        try:
            return name in json.loads(line)
        except (ValueError, TypeError, RecursionError):
            return False

    return any(map(named, Path(path).read_bytes().splitlines()))


def read_row(line, fields):
    """A line, bytes -> the strings of `fields`, and the number of its "window" or None.

    Raises ValueError, which says what is wrong.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("line is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("line is not JSON") from None
    for name in fields:
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise ValueError(f"{name} is missing or no string")
        if any("\ud800" <= character <= "\udfff" for character in row[name]):
            raise ValueError(f"{name} is not valid Unicode")
    window = row.get("window")
    if window is not None and (type(window) is not int or window < 0):
        raise ValueError(f"window is {window!r}, wanted its number, from 0")
    return *(row[name] for name in fields), window


def find_video(folder, name):
    """The path of a video.

    Raises ValueError unless it is inside the folder, symbolic links followed.
    """
    path = folder / os.fsdecode(name.encode())  # files are named in UTF-8, whatever the locale
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    if Path(name).is_absolute() or not inside:
        raise ValueError("video leaves the folder of videos")
    return path


# ---------------------------------------------------------------- what the tools wrote


def read_lines(path, fields):
    """The complete lines of a JSONL file of ours, parsed: a kill may have cut the last one.

    Raises ValueError for a line that lacks one of the fields.
    """
    data = path.read_bytes() if path.exists() else b""
    complete = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            rows.append(json.loads(line))
            [rows[-1][name] for name in fields]
        except (ValueError, LookupError, TypeError, RecursionError):
            wanted = f"wanted an object with {', '.join(fields)}"
            raise ValueError(f"line {number} of {path} is {line[:40]!r}, {wanted}") from None
    return rows


def write_lines(path, rows):
    """Rows as a JSONL file, whole or not there."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
