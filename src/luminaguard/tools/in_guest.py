"""Runs in the machine, as the workload: one file tool, told as JSON on standard input.

Only the standard library of the guest's Python is there. What a model reads goes to standard output; what
is wrong, in a sentence, to standard error, with exit status 1.
"""

import fnmatch
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

MOST_LINES = 2000
MOST_MATCHES = 500
LONGEST = 2000
SKIPPED = {".git", "node_modules", "__pycache__", ".venv"}


def fail(sentence: str) -> NoReturn:
    sys.stderr.write(sentence + "\n")
    sys.exit(1)


def inside(path: str) -> str:
    """The path below the workspace that was meant; what is elsewhere ends with the machine."""
    top = os.getcwd()
    whole = os.path.normpath(os.path.join(top, path))
    if whole != top and not whole.startswith(top + "/"):
        fail(f"{path!r} is not in the workspace; what is written elsewhere is thrown away with the machine.")
    return whole


def text_of(path: str, name: str) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError:
        fail(f"{name!r} is not text; look at it with shell (file, xxd, strings).")
    except OSError as error:
        fail(f"{name!r} cannot be read: {error.strerror}.")


def put(path: str, name: str, text: str) -> None:
    try:
        if os.path.dirname(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        fail(f"{name!r} cannot be written: {error.strerror}.")


def read_file(path: str, offset: int = 1, limit: int = MOST_LINES) -> None:
    lines = text_of(inside(path), path).splitlines()
    first, count = max(1, offset), max(1, min(limit, MOST_LINES))
    chosen = lines[first - 1 : first - 1 + count]
    print("\n".join(line if len(line) <= LONGEST else line[:LONGEST] + " …" for line in chosen))
    if first - 1 + len(chosen) < len(lines):
        last = first - 1 + len(chosen)
        print(f"[lines {first} to {last} of {len(lines)}; go on with offset {last + 1}]")


def write_file(path: str, content: str) -> None:
    whole = inside(path)
    existed = os.path.exists(whole)
    put(whole, path, content)
    print(f"{'replaced' if existed else 'created'} {path}: {len(content.encode())} bytes")


def edit_file(path: str, old: str, new: str, everywhere: bool = False) -> None:
    whole = inside(path)
    text = text_of(whole, path)
    found = text.count(old) if old else 0
    if not found:
        fail(f"{path!r} does not contain that text; read it again, and give it exactly, with its white space.")
    if found > 1 and not everywhere:
        fail(f"{path!r} contains that text {found} times: give more of what is around it, or everywhere = true.")
    put(whole, path, text.replace(old, new))
    print(f"edited {path}: {found} place{'s' * (found > 1)}")


def walk(top: str) -> Iterator[str]:
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(names):
            yield os.path.join(folder, name)


def list_files(path: str = ".", pattern: str = "*") -> None:
    top, shown = inside(path), 0
    if not os.path.isdir(top):
        fail(f"{path!r} is not a folder.")
    for file in walk(top):
        name = os.path.relpath(file)
        if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(os.path.basename(name), pattern):
            shown += 1
            if shown <= MOST_LINES:
                target = f" -> {os.readlink(file)}" if os.path.islink(file) else ""
                print(f"{os.lstat(file).st_size:>9}  {name}{target}")
    print(f"[{shown} files{f', the first {MOST_LINES} of them' if shown > MOST_LINES else ''}]")


def search_files(regex: str, path: str = ".", pattern: str = "*") -> None:
    try:
        wanted = re.compile(regex)
    except re.error as error:
        fail(f"{regex!r} is no regular expression: {error}.")
    top, shown = inside(path), 0
    for file in walk(top) if os.path.isdir(top) else [top]:
        name = os.path.relpath(file)
        if not (fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(os.path.basename(name), pattern)):
            continue
        try:
            with open(file, encoding="utf-8") as opened:
                for number, line in enumerate(opened, 1):
                    if wanted.search(line):
                        shown += 1
                        if shown > MOST_MATCHES:
                            print(f"[more than {MOST_MATCHES} matches: search for less]")
                            return
                        print(f"{name}:{number}: {line.rstrip()[:LONGEST]}")
        except (OSError, UnicodeDecodeError):
            continue
    print(f"[{shown} matches]")


TOOLS: dict[str, Callable[..., None]] = {
    "read_file": read_file,
    "write_file": write_file,
    "edit_file": edit_file,
    "list_files": list_files,
    "search_files": search_files,
}
if __name__ == "__main__":
    asked = json.load(sys.stdin)
    TOOLS[asked["tool"]](**asked["arguments"])
