"""Find Firecracker and its jailer, and refuse the versions that are known to go wrong.

Versions (docs/RELEASE_POLICY and CHANGELOG of Firecracker):

* 1.15 to 1.17 are accepted; the API of others is not known here.
* 1.16.0 loses vsock traffic after a restore (mended in 1.16.1): refused.
* 1.16 does not let the host connect any more once a machine was paused and resumed without a
  snapshot in between (#6100): such a machine is never paused, see :attr:`Firecracker.can_pause`.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass

from luminaguard.errors import HypervisorUnavailable

__all__ = ["NEWEST", "OLDEST", "Firecracker", "check_owner", "find_firecracker"]

OLDEST, NEWEST = (1, 15), (1, 17)
_BROKEN = {(1, 16, 0)}
_INSTALL = (
    "Install a release of Firecracker 1.16.1 with its jailer (both files of the same version) and "
    "set LUMINAGUARD_FIRECRACKER and LUMINAGUARD_JAILER to them; or set backend to 'qemu'."
)


@dataclass(frozen=True, slots=True)
class Firecracker:
    """A usable pair of programs; ``snapshot_version`` is the format that it writes and reads."""

    path: str
    jailer: str
    version: tuple[int, int, int]
    snapshot_version: str

    @property
    def can_override_vsock(self) -> bool:
        """Whether a loaded machine can be told where its vsock socket belongs."""
        return self.version[:2] >= (1, 16)

    @property
    def can_pause(self) -> bool:
        """Whether a machine can be paused, and go on, without being saved."""
        return self.version[:2] != (1, 16)


def find_firecracker(firecracker: str, jailer: str) -> Firecracker:
    """Locate both programs and ask their versions.

    Args:
        firecracker: name or path.
        jailer: name or path.

    Raises:
        HypervisorUnavailable: one is missing, cannot be run, is of a version that is not used, or
            they do not belong together.
    """
    path, jailer_path = _which(firecracker), _which(jailer)
    version, of_jailer = _version(path), _version(jailer_path)
    if version != of_jailer:
        raise HypervisorUnavailable(
            f"Firecracker is {_dotted(version)} and its jailer {_dotted(of_jailer)}.", hint=_INSTALL
        )
    if not OLDEST <= version[:2] <= NEWEST or version in _BROKEN:
        why = "loses vsock traffic after a restore" if version in _BROKEN else "is outside of 1.15 to 1.17"
        raise HypervisorUnavailable(f"Firecracker {_dotted(version)} {why}.", hint=_INSTALL)
    said = _said([path, "--snapshot-version"])
    match = re.search(r"^v?(\d+\.\d+\.\d+)\s*$", said, re.MULTILINE)
    if not match:
        raise HypervisorUnavailable(f"'{path}' does not say its snapshot version.", hint=_INSTALL)
    return Firecracker(path, jailer_path, version, match[1])


def _which(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise HypervisorUnavailable(f"'{name}' was not found.", hint=_INSTALL)
    path = os.path.realpath(path)
    check_owner(path)
    return path


def check_owner(path: str) -> None:
    """The jailer runs with all rights: whoever can change or exchange it has them too.

    Raises:
        HypervisorUnavailable: someone else can.
    """
    place = path
    while True:
        info = os.stat(place)
        is_shared = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX  # such as /tmp: nobody renames ours
        if info.st_uid not in {0, os.geteuid()} or (info.st_mode & 0o022 and not is_shared):
            raise HypervisorUnavailable(
                f"'{place}' can be changed by others than you and root.",
                hint=f"chown root '{place}'; chmod 755 '{place}'",
            )
        if place == "/":
            return
        place = os.path.dirname(place)


def _version(path: str) -> tuple[int, int, int]:
    match = re.search(r"^(?:Firecracker|Jailer) v(\d+)\.(\d+)\.(\d+)", _said([path, "--version"]), re.MULTILINE)
    if not match:
        raise HypervisorUnavailable(f"'{path}' does not say a Firecracker version.", hint=_INSTALL)
    return int(match[1]), int(match[2]), int(match[3])


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL
        ).stdout[:4096]
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        raise HypervisorUnavailable(f"'{command[0]}' cannot be run: {error}.", hint=_INSTALL) from error


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))
