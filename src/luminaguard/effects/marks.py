"""What a person must not miss about a change, decided from its path and entries alone.

Most attacks on a reviewer hide in plain sight: a hook among fifty edited files, an executable bit,
a link that leaves the folder. Each mark is a word that stands at the change on the card.
"""

from __future__ import annotations

from enum import Enum

from luminaguard.effects.changes import Change, DirEntry, FileEntry, LinkEntry
from luminaguard.effects.text import hides_something, mixes_scripts

__all__ = ["LOUD", "QUIETER", "Mark", "marks_of"]


class Mark(Enum):
    """A reason to look twice; the value is the word on the card."""

    HOOK = "GIT HOOK"
    GIT = "GIT INTERNALS"
    CI = "CI"
    AUTORUN = "RUNS BY ITSELF"
    EXECUTABLE = "EXECUTABLE"
    SYMLINK = "SYMLINK"
    LEAVES = "LEAVES THE FOLDER"
    MODE = "MODE"
    WRITABLE = "WRITABLE BY ALL"
    TYPE = "TYPE CHANGED"
    DELETION = "DELETED"
    HIDDEN = "HIDDEN"
    BINARY = "BINARY"
    NAME = "DECEPTIVE NAME"
    CONTROL = "CONTROL CHARACTERS"
    LARGE = "LARGE"
    UNSEEN = "NOT SHOWN"


QUIETER = (Mark.DELETION, Mark.MODE, Mark.HIDDEN, Mark.BINARY, Mark.LARGE)
"""Counted at the top of a card; each is too common to be listed there one by one."""
LOUD = frozenset({Mark.HOOK, Mark.CI, Mark.AUTORUN, Mark.EXECUTABLE, Mark.LEAVES, Mark.WRITABLE, Mark.TYPE,
                  Mark.NAME, Mark.CONTROL, Mark.GIT, Mark.SYMLINK, Mark.UNSEEN})  # fmt: skip
_CI_FILES = frozenset({".gitlab-ci.yml", ".travis.yml", "jenkinsfile", "azure-pipelines.yml", ".drone.yml",
                       "bitbucket-pipelines.yml", ".woodpecker.yml", "appveyor.yml", "cloudbuild.yaml"})  # fmt: skip
_CI_FOLDERS = frozenset({".circleci", ".buildkite", ".woodpecker", ".ci", ".gitlab"})
_AUTORUN_FILES = frozenset({
    ".bashrc", ".bash_profile", ".bash_login", ".bash_logout", ".profile", ".zshrc", ".zshenv", ".zprofile",
    ".envrc", ".direnvrc", ".gitattributes", ".gitmodules", ".gitconfig", ".npmrc", ".yarnrc",
    ".pre-commit-config.yaml",
    "makefile", "gnumakefile", "justfile", "package.json", "setup.py", "conftest.py", "sitecustomize.py",
    "usercustomize.py", "tox.ini", "noxfile.py", "cmakelists.txt", "build.rs", "build.gradle", "rakefile",
    "gemfile", "dockerfile", ".mcp.json", ".vimrc", ".exrc", ".gdbinit", ".pythonrc", "crontab",
})  # fmt: skip
_AUTORUN_FOLDERS = frozenset({".vscode", ".idea", ".devcontainer", ".husky", ".claude", ".cursor", "autostart"})
_OF_THE_DELETED = frozenset({Mark.HOOK, Mark.CI, Mark.GIT, Mark.HIDDEN, Mark.NAME, Mark.CONTROL})
_FORGES = frozenset({".github", ".gitea", ".forgejo"})
_LARGE = 10 << 20


def marks_of(change: Change) -> tuple[Mark, ...]:
    """The marks of one change, loudest first."""
    path, before, after = change.path, change.before, change.after
    found = set(_of_path(path)) if after is not None else set()
    if after is None:
        found.add(Mark.DELETION)
        found |= {mark for mark in _of_path(path) if mark in _OF_THE_DELETED}
    if before is not None and after is not None and type(before) is not type(after):
        found.add(Mark.TYPE)
    if isinstance(after, LinkEntry):
        found.add(Mark.SYMLINK)
        if _leaves(path, after.target):
            found.add(Mark.LEAVES)
        if hides_something(after.target):
            found.add(Mark.CONTROL)
    if isinstance(after, FileEntry):
        if after.mode & 0o111:
            found.add(Mark.EXECUTABLE)
        if after.size > _LARGE:
            found.add(Mark.LARGE)
    if isinstance(after, FileEntry | DirEntry):
        if isinstance(before, FileEntry | DirEntry) and before.mode != after.mode:
            found.add(Mark.MODE)
        if after.mode & 0o002:
            found.add(Mark.WRITABLE)
    return tuple(mark for mark in Mark if mark in found)


def _of_path(path: str) -> set[Mark]:
    components = path.casefold().split("/")
    name, folders = components[-1], components[:-1]
    found = set()
    if any(component.startswith(".") for component in components):
        found.add(Mark.HIDDEN)
    # A file system that folds case finds .GIT/hooks as well: compare without case.
    repository = next((i for i, component in enumerate(components) if component.endswith(".git")), None)
    if repository is not None:  # .git, or a bare one such as project.git
        inside = components[repository + 1 :]
        if "hooks" in inside[:-1] and not name.endswith(".sample"):  # of a submodule too: modules/NAME/hooks
            found.add(Mark.HOOK)
        elif inside[:1] in (["config"], ["info"], ["config.worktree"]):
            found |= {Mark.GIT, Mark.AUTORUN}
        else:
            found.add(Mark.GIT)
    if ".githooks" in folders:
        found.add(Mark.HOOK)
    if name in _CI_FILES or _CI_FOLDERS & set(folders) or _runs_workflows(folders):
        found.add(Mark.CI)
    if name in _AUTORUN_FILES or _AUTORUN_FOLDERS & set(folders):
        found.add(Mark.AUTORUN)
    if hides_something(path):
        found.add(Mark.CONTROL)
    if any(mixes_scripts(component) for component in path.split("/")) or any(
        component != component.strip() for component in path.split("/")
    ):
        found.add(Mark.NAME)
    return found


def _runs_workflows(folders: list[str]) -> bool:
    return bool(_FORGES & set(folders)) and bool({"workflows", "actions"} & set(folders))


def _leaves(path: str, target: str) -> bool:
    """Whether a link can point out of the workspace: absolute, more ``..`` than folders, or ``..`` after a name.

    A name in a target may be a link itself, and ``..`` behind it leads from where that one points.
    """
    if target.startswith("/"):
        return True
    depth, named = path.count("/"), False
    for component in target.split("/"):
        if component == "..":
            depth -= 1
            if named or depth < 0:
                return True
        elif component not in {"", "."}:
            depth, named = depth + 1, True
    return False
