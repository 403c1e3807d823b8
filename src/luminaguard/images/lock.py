"""The package lock: which packages, by name, version and SHA-256, make up a guest image.

A lock is resolved by apt itself against an empty dpkg status, from the sources that this machine
has configured, so security updates are in it and Debian's signatures are the root of trust. No
address of a mirror is part of it. Downloads go through ``apt-get download`` as an ordinary user
and are compared with the lock before anyone reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from luminaguard.errors import ImageBuildFailed, LockOutdated, PackageUnavailable, StorageError
from luminaguard.images import spec

__all__ = ["LockedPackage", "PackageLock", "Role", "distribution", "fetch", "resolve", "resolve_extra",
           "resolve_sources", "shipped"]  # fmt: skip

Role = Literal["root", "initramfs", "kernel"]
_APT_TIMEOUT_S = 600
_FULL_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class LockedPackage:
    """One .deb: what it is called, what it must hash to, and where in the machine it goes."""

    name: str
    version: str
    architecture: str
    sha256: str
    suite: str
    role: Role

    @property
    def filename(self) -> str:
        """The name that apt gives the downloaded file (a colon cannot stand in it)."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


@dataclass(frozen=True, slots=True)
class PackageLock:
    """All packages of an image, in a fixed order."""

    distribution: str
    packages: tuple[LockedPackage, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON: the identity of the lock."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()

    def role(self, role: Role) -> tuple[LockedPackage, ...]:
        """The packages with this role."""
        return tuple(p for p in self.packages if p.role == role)

    def with_kernel(self, sources: LockedPackage) -> PackageLock:
        """The same lock with the sources of a kernel in place of the kernel."""
        others = tuple(p for p in self.packages if p.role != "kernel")
        return PackageLock(self.distribution, (*others, sources))

    def dumps(self) -> str:
        """The lock as JSON, one package a line, ending in a newline."""
        rows = ",\n    ".join(json.dumps(asdict(p), sort_keys=True) for p in self.packages)
        head = json.dumps(self.distribution)
        return f'{{\n  "format": 1,\n  "distribution": {head},\n  "packages": [\n    {rows}\n  ]\n}}\n'

    @classmethod
    def loads(cls, text: str, source: str) -> PackageLock:
        """Parse a lock.

        Raises:
            ImageBuildFailed: the text is not a lock of format 1.
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            if raw["format"] != 1:
                raise ValueError(f"format {raw['format']!r}")
            packages = tuple(LockedPackage(**row) for row in raw["packages"])
            return cls(str(raw["distribution"]), packages)
        except (ValueError, KeyError, TypeError) as error:
            raise ImageBuildFailed(
                f"The package lock {source} cannot be read: {error}.",
                hint="Write a new one with 'luminaguard image lock'.",
            ) from error


def distribution() -> tuple[str, str]:
    """The ``ID`` and ``VERSION_ID`` of this machine's os-release, such as ``("debian", "12")``."""
    fields = dict(
        line.rstrip("\n").split("=", 1)
        for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
        if "=" in line
    )
    return fields.get("ID", "").strip('"'), fields.get("VERSION_ID", "").strip('"')


def shipped() -> PackageLock | None:
    """The lock that comes with LuminaGuard for this distribution, if there is one."""
    name = "-".join(distribution()) + ".json"
    entry = resources.files("luminaguard.images") / "locks" / name
    if not entry.is_file():
        return None
    return PackageLock.loads(entry.read_text(encoding="utf-8"), name)


def resolve() -> PackageLock:
    """Ask apt for the closure of the guest's packages as this machine's sources offer them today.

    Raises:
        PackageUnavailable: apt does not know a package, or is not there.
    """
    system, release = distribution()
    meta = spec.KERNEL_PACKAGES.get(system)
    if meta is None:
        raise PackageUnavailable(
            f"This machine runs '{system or 'an unknown system'}', and guest images are put "
            "together from Debian or Ubuntu packages.",
            hint="Build the image on Debian 12 or 13, or Ubuntu 24.04.",
        )
    chosen: list[tuple[str, str, str, Role]] = []
    for name, version, suite in _closure(spec.ROOT_PACKAGES):
        if name not in spec.DROPPED_PACKAGES:
            chosen.append((name, version, suite, "root"))
    for name, version, suite in _closure(spec.INITRAMFS_PACKAGES):
        if name in spec.INITRAMFS_PACKAGES:
            chosen.append((name, version, suite, "initramfs"))
    for name, version, suite in _closure((meta,)):
        if re.match(r"linux-(image|modules)-\d", name):
            chosen.append((name, version, suite, "kernel"))
    index = _index([(name, version) for name, version, _, _ in chosen])
    packages = []
    for name, version, suite, role in chosen:
        if (name, version) not in index:
            raise PackageUnavailable(
                f"apt's index has no SHA-256 for {name} {version}.",
                hint="Run 'apt-get update' as root and try again.",
            )
        packages.append(LockedPackage(name, version, *index[name, version], suite, role))
    packages.sort(key=lambda p: (p.role, p.name))
    return PackageLock(f"{system}-{release}", tuple(packages))


def resolve_extra(names: tuple[str, ...], present: frozenset[str]) -> PackageLock:
    """Ask apt for packages and all they depend on, but for those that an image has.

    Args:
        names: of the packages.
        present: names of what the image is made of.

    Raises:
        PackageUnavailable: apt does not know one, or is not there.
    """
    chosen = [row for row in _closure(names) if row[0] not in present | spec.NEVER_NEEDED]
    index = _index([(name, version) for name, version, _ in chosen])
    unknown = [name for name, version, _ in chosen if (name, version) not in index]
    if unknown:
        raise PackageUnavailable(
            f"apt's index has no SHA-256 for {', '.join(unknown[:4])}.", hint="Run 'apt-get update' as root."
        )
    packages = (LockedPackage(name, version, *index[name, version], suite, "root") for name, version, suite in chosen)
    return PackageLock("-".join(distribution()), tuple(packages))


def resolve_sources() -> LockedPackage:
    """Ask apt for the newest sources of the distribution's kernel.

    Raises:
        PackageUnavailable: apt does not know them, or is not there.
    """
    for name, version, suite in _closure((spec.KERNEL_SOURCES,)):
        if re.fullmatch(rf"{spec.KERNEL_SOURCES}-\d[\d.]*", name):
            index = _index([(name, version)])
            if (name, version) in index:
                return LockedPackage(name, version, *index[name, version], suite, "kernel")
    raise PackageUnavailable(
        f"apt does not know the package that {spec.KERNEL_SOURCES} stands for.",
        hint="Run 'apt-get update' as root and try again.",
    )


def fetch(lock: PackageLock, folder: Path) -> list[Path]:
    """Download what is not in ``folder`` yet; return the files in the order of the lock.

    Raises:
        LockOutdated: a locked version is not offered any more.
        PackageUnavailable: the download failed.
        StorageError: the disk is full.
        ImageBuildFailed: a file differs from its locked SHA-256 (it is deleted).
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    missing = [p for p in lock.packages if not (folder / p.filename).is_file()]
    offered = _index([(p.name, p.version) for p in missing])
    gone = [p for p in missing if offered.get((p.name, p.version), ("", ""))[1] != p.sha256]
    if gone:
        names = ", ".join(f"{p.name} {p.version}" for p in gone[:4])
        raise LockOutdated(
            f"{len(gone)} locked packages are not offered by this machine's sources: {names}.",
            hint="Run 'apt-get update' as root. If they were replaced by newer versions, build "
            "without --locked, or write a new lock with 'luminaguard image lock'.",
        )
    if missing:
        partial = folder / f".partial-{os.getpid()}"
        partial.mkdir(mode=0o700, exist_ok=True)
        try:
            _apt(
                "apt-get",
                "-q",
                "download",
                *(f"{p.name}={p.version}" for p in missing),
                cwd=partial,
            )
            for package in missing:
                _check(package, partial / package.filename)
                (partial / package.filename).chmod(0o600)
                (partial / package.filename).replace(folder / package.filename)
        except PackageUnavailable as error:
            if shutil.disk_usage(partial).free < _FULL_BYTES:
                raise StorageError(
                    "The packages could not be downloaded: the disk is full.",
                    hint="Free about 500 MB in the cache folder and run the build again.",
                    kept="Finished downloads were kept.",
                ) from error
            raise
        finally:
            for leftover in partial.iterdir():
                leftover.unlink()
            partial.rmdir()
    for package in lock.packages:
        _check(package, folder / package.filename)
    return [folder / p.filename for p in lock.packages]


def _check(package: LockedPackage, path: Path) -> None:
    try:
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PackageUnavailable(
            f"The download of {package.name} {package.version} left no file: {error}.",
            hint="Check the network and run the build again; finished downloads are kept.",
        ) from error
    if actual != package.sha256:
        path.unlink()
        raise ImageBuildFailed(
            f"{package.filename} has SHA-256 {actual}, but the lock says {package.sha256}.",
            hint="The file was deleted. If it happens again, do not trust the mirror.",
        )


def _closure(names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Names, versions and suites of ``names`` and all they depend on, with nothing installed."""
    out = _apt(
        "apt-get", "-s", "-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=false",
        "install", *names,
    )  # fmt: skip
    rows = re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) ([^\[)]*)", out, re.MULTILINE)
    return sorted((name.split(":")[0], version, suite.split(",")[0].strip()) for name, version, suite in rows)


def _index(packages: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """Architecture and SHA-256 by name and version, from apt's signed indices; unknown ones lack."""
    if not packages:
        return {}
    wanted = (f"{name}={version}" for name, version in packages)
    found = {}
    # apt-cache prints the packages that it knows even when it fails for the others.
    for stanza in _apt("apt-cache", "show", *wanted, may_fail=True).split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture|SHA256): (\S+)$", stanza, re.MULTILINE))
        if len(fields) == 4:
            key = (fields["Package"], fields["Version"])
            found[key] = (fields["Architecture"], fields["SHA256"])
    return found


def _apt(*command: str, cwd: Path | None = None, may_fail: bool = False) -> str:
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL, timeout=_APT_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackageUnavailable(
            f"'{command[0]}' could not be run: {error}.",
            hint="Guest images are built on Debian or Ubuntu, where apt is installed.",
        ) from error
    if done.returncode and not may_fail:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise PackageUnavailable(
            f"'{' '.join(command[:3])} …' failed: {' '.join(said[:3]) or done.stderr.strip()[-300:]}",
            hint="Run 'apt-get update' as root; check the network and the apt sources.",
        )
    return done.stdout
