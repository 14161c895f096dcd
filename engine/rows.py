"""JSON lines that a run writes and a later one goes on with."""

import json
import sys
from pathlib import Path


def read_rows(path, *names):
    """The rows of a JSONL file of an earlier run, but for a last line that was cut; [] if none.

    Raises ValueError for a file of anything but objects with strings of these names.
    """
    path = Path(path)
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        rows = [json.loads(line) for line in lines]
        strings = all(isinstance(row[name], str) for row in rows for name in names)
        if not strings or rest[:1] not in ("", "{"):
            raise TypeError
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"--out: {path} is not what an earlier run wrote, wanted lines of JSON with "
            f"{' and '.join(names)}, to go on, or a new place"
        ) from None
    if rows:
        print(f"{path} has {len(rows)} already: they stay as they are", file=sys.stderr)
    return rows


def append_row(path, row):
    """Adds a row to a JSONL file, unless it is there, in the place of a last line that was cut."""
    # a file's name may be no UTF-8: JSON escapes what is not in it, as backslashreplace does
    line = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        if line not in text:
            file.write(line)
