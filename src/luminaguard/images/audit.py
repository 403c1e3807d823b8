"""Look at a built image as an auditor would: at the file itself, not at what the build meant to do.

Each check has a name, a verdict and what it saw. A waiver is a fault that is known, with the reason why it
stands; it is reported as one and never as a pass. What a check cannot see, it does not claim.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from luminaguard.errors import Unavailable
from luminaguard.images import elf, spec
from luminaguard.images.manifest import INITRAMFS, KERNEL, PARTS, ROOT, SBOM, Image

__all__ = ["FORBIDDEN_PROGRAMS", "MAX_FILES", "MAX_ROOT_BYTES", "WAIVERS", "Check", "Waiver", "audit", "audit_layer",
           "listed"]  # fmt: skip

Verdict = Literal["pass", "waived", "fail"]
MAX_ROOT_BYTES = 64 << 20
MAX_FILES = 4000
_SUPERBLOCK_MAGIC = b"hsqs"
_NO_XATTRS = 0x0200  # of the superblock's flags (Documentation/filesystems/squashfs.rst)

FORBIDDEN_PROGRAMS = frozenset({
    # package managers
    "apk", "apt", "apt-get", "dnf", "dpkg", "easy_install", "npm", "pip", "pip3", "rpm", "uv", "yum",
    # compilers, linkers, debuggers, tracers
    "ar", "as", "c++", "cc", "clang", "cpp", "g++", "gcc", "gdb", "go", "ld", "ld.bfd", "ld.gold", "lldb", "ltrace",
    "make", "nasm", "objcopy", "objdump", "perf", "rustc", "strace", "tcc",
    # network clients and servers
    "curl", "dig", "ftp", "git-daemon", "host", "ip", "ifconfig", "nc", "ncat", "netcat", "nmap", "openssl", "ping",
    "rsync", "scp", "sftp", "socat", "ssh", "sshd", "tcpdump", "telnet", "wget",
    # other interpreters
    "busybox", "guile", "lua", "node", "perl", "php", "ruby", "tclsh",
    # what changes the machine or the user
    "chroot", "dmsetup", "insmod", "kexec", "kmod", "losetup", "modprobe", "mount", "newgrp", "nsenter", "passwd",
    "pivot_root", "su", "sudo", "swapon", "umount", "unshare",
})  # fmt: skip
_MAKERS_CHOICE = frozenset({
    "programs", "budget", "modules", "names", "elf", "elf-nx", "elf-relro", "elf-bind-now", "elf-pie", "elf-canary",
    "elf-search-path",
})  # fmt: skip
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_CREDENTIALS = frozenset({"id_rsa", "id_ed25519", "authorized_keys", ".netrc", ".git-credentials"})
_MAX_KEY_FILE = 1 << 20
_MAX_ELF = 512 << 20
_LAYER_INTERPRETER = "usr/bin/node"
_STICKY_FOLDERS = frozenset({"tmp", "var/tmp"})


@dataclass(frozen=True, slots=True)
class Waiver:
    """A fault that is known: of which check, at which paths, and why it stands."""

    check: str
    path: re.Pattern[str]
    reason: str


WAIVERS = (
    Waiver("elf-pie", re.compile(r"usr/bin/(python3\.\d+|gawk)|usr/lib/x86_64-linux-gnu/awk/(gr|pw)cat"),
           "the distribution links it at a fixed address; its heap, stack and libraries have random ones"),
    Waiver("elf-canary", re.compile(r"usr/lib/x86_64-linux-gnu/awk/(gr|pw)cat|usr/bin/(getconf|bzip2recover|jq)"),
           "the distribution builds it without, or it has no array on its stack"),
    Waiver("elf-search-path", re.compile(r"usr/bin/(expr|factor)"),
           "its RUNPATH is the system's own library folder, which is read-only"),
    Waiver("elf-bind-now", re.compile(r"usr/(bin|lib/git-core)/[^/]+|usr/lib/x86_64-linux-gnu/(awk/\w+|libc\.so\.6)"),
           "the distribution links most programs lazily (partial RELRO); a command's machine is thrown away after it"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Check:
    """One check and what came of it; ``faults`` are those that no waiver covers."""

    name: str
    verdict: Verdict
    detail: str
    faults: tuple[str, ...] = ()
    waived: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of ``unsquashfs -lln``."""

    path: str
    mode: str
    owner: str


def audit(image: Image, step: Callable[[str], None] = lambda _: None) -> list[Check]:
    """Verify and inspect an image.

    Args:
        image: a built one.
        step: told in a few words what is being done.

    Raises:
        ImageTampered: a part is not what the manifest says: nothing about it is worth a look.
        Unavailable: unsquashfs is missing.
    """
    step("verifying every part")
    image.verify()
    root = image.folder / ROOT
    entries, unread = _listed(root)
    metadata = _metadata(entries)
    checks = [
        Check("integrity", "pass", f"{len(PARTS)} parts have the SHA-256 of their manifest"),
        _squashfs(root),
        _judged("names", "every name is one line of text", unread),
        *metadata,
        _programs(entries),
        _modules(entries, image.folder / INITRAMFS),
        _bill(image),
        _budget(image, entries),
    ]
    if any(check.name == "devices" and check.verdict == "fail" for check in metadata):
        return checks  # it has failed, and only root could unpack it
    with tempfile.TemporaryDirectory(prefix=".audit-", dir=image.folder.parent) as folder:
        tree = Path(folder) / "root"
        step("unpacking the root file system")
        _unsquashfs("-q", "-n", "-no-xattrs", "-d", str(tree), str(root))
        step("looking at every file")
        found = [*checks, *_accounts(tree), _secrets(tree), *_elf(tree)]
    return [_of_a_container(check) for check in found] if image.manifest.container else found


def audit_layer(disk: Path, work: Path | None = None) -> list[Check]:
    """Inspect the disk of a layer, which its manifest was found to fit.

    Args:
        disk: a squashfs.
        work: a folder in which it may be unpacked; without one the programs themselves are not looked at.

    Raises:
        Unavailable: unsquashfs is missing.
    """
    entries, unread = _listed(disk)
    outside = [e.path for e in entries if e.path not in {"", "usr"} and not e.path.startswith("usr/")]
    checks = [
        _squashfs(disk),
        _judged("names", "every name is one line of text", unread),
        *_metadata(entries),
        _judged("place", "all lies below /usr, beside what the image has", outside),
        _programs([e for e in entries if e.path.startswith("usr/bin/") and e.path != _LAYER_INTERPRETER]),
    ]
    if work is None:
        return checks
    with tempfile.TemporaryDirectory(prefix=".audit-", dir=work) as folder:
        tree = Path(folder) / "root"
        _unsquashfs("-q", "-n", "-no-xattrs", "-d", str(tree), str(disk))
        return [*checks, *(_of_others(check, "its maker built it so") for check in _elf(tree))]


def _of_others(check: Check, reason: str) -> Check:
    if check.verdict != "fail" or check.name not in _MAKERS_CHOICE:
        return check
    return replace(check, verdict="waived", waived=(*check.waived, *check.faults), faults=(),
                   reasons=(*check.reasons, reason))  # fmt: skip


def _of_a_container(check: Check) -> Check:
    """What its maker has chosen is said, and is no fault of the build; what a machine must not have stays one."""
    return _of_others(check, "the container image has it: its maker's choice")


def _unsquashfs(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ("unsquashfs", *arguments), capture_output=True, text=True, errors="surrogateescape", check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Unavailable("unsquashfs is not installed.", hint="apt-get install squashfs-tools") from error
    if done.returncode:
        raise Unavailable(
            f"The root file system could not be read: {done.stderr.strip()[-300:]}",
            hint="Check that the cache folder has 500 MB free.",
        )
    return done.stdout


def _listed(root: Path) -> tuple[list[_Entry], list[str]]:
    """All entries, and the lines that are none, as a name with a line break makes."""
    line = re.compile(r"(?P<mode>[a-zA-Z-]{10}) (?P<owner>\d+/\d+) .*? \d\d:\d\d squashfs-root/?(?P<path>.*)")
    entries, unread = [], []
    for text in _unsquashfs("-lln", str(root)).split("\n"):
        if found := line.fullmatch(text):
            path = found["path"].split(" -> ")[0] if found["mode"][0] == "l" else found["path"]
            entries.append(_Entry(path, found["mode"], found["owner"]))
        elif text:
            unread.append(text)
    return entries, unread


def listed(root: Path) -> list[_Entry]:
    """All entries of a squashfs; raises Unavailable."""
    return _listed(root)[0]


def _judged(name: str, detail: str, faults: list[str]) -> Check:
    """Fail for each path that no waiver of this check covers."""
    covering = [waiver for waiver in WAIVERS if waiver.check == name]
    waived = [fault for fault in faults if any(w.path.fullmatch(fault) for w in covering)]
    left = [fault for fault in faults if fault not in set(waived)]
    reasons = tuple(w.reason for w in covering if any(w.path.fullmatch(fault) for fault in waived))
    verdict: Verdict = "fail" if left else "waived" if waived else "pass"
    return Check(name, verdict, detail, tuple(sorted(left)), tuple(sorted(waived)), reasons)


def _squashfs(root: Path) -> Check:
    with root.open("rb") as file:
        superblock = file.read(96)
    flags = int.from_bytes(superblock[24:26], "little")
    faults = []
    if superblock[:4] != _SUPERBLOCK_MAGIC:
        faults.append("it is no squashfs, which nothing can be written to")
    if not flags & _NO_XATTRS:
        faults.append("it stores extended attributes, where file capabilities would be")
    return _judged("read-only", "a squashfs without extended attributes, so without file capabilities", faults)


def _metadata(entries: list[_Entry]) -> list[Check]:
    special = [e.path for e in entries if e.mode[3] in "sS" or e.mode[6] in "sS"]
    devices = [e.path for e in entries if e.mode[0] not in "-dl"]
    writable = [
        e.path for e in entries
        if e.mode[0] != "l" and e.mode[8] == "w" and not (e.path in _STICKY_FOLDERS and e.mode[9] == "t")
    ]  # fmt: skip
    foreign = [e.path for e in entries if e.owner != "0/0"]
    return [
        _judged("set-id", f"none of {len(entries)} entries has a set-id bit", special),
        _judged("devices", "only files, folders and links", devices),
        _judged("writable-by-all", "only /tmp and /var/tmp, which are sticky", writable),
        _judged("owner", "all belongs to uid 0 and gid 0", foreign),
    ]


def _programs(entries: list[_Entry]) -> Check:
    found = [e.path for e in entries if e.mode[0] != "d" and e.path.rpartition("/")[2] in FORBIDDEN_PROGRAMS
             and ("bin/" in e.path or "git-core/" in e.path)]  # fmt: skip
    return _judged("programs", f"none of {len(FORBIDDEN_PROGRAMS)} that have no place here", found)


def _modules(entries: list[_Entry], initramfs: Path) -> Check:
    faults = [e.path for e in entries if re.search(r"\.ko(\.[a-z0-9]+)?$", e.path)]
    names = sorted(set(re.findall(rb"modules/([A-Za-z0-9_-]+)\.ko\0", initramfs.read_bytes())))
    loaded = {name.decode().replace("-", "_") for name in names}
    most = 2 * len(spec.KERNEL_MODULES + spec.VSOCK_MODULES)
    if len(loaded) > most:
        faults.append(f"the initramfs has {len(loaded)} modules; those named and what they need are at most {most}")
    return _judged("modules", f"none in the root; the initramfs loads {', '.join(sorted(loaded)) or 'none'}", faults)


def _accounts(tree: Path) -> list[Check]:
    faults = []
    rows = [line.split(":") for line in (tree / "etc/passwd").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row[1] not in {"x", "*", "!"}:
            faults.append(f"{row[0]} has a password field")
        if row[0] != "user" and not row[6].endswith(("/nologin", "/false")):
            faults.append(f"{row[0]} has the shell {row[6]}")
        if row[2] == "0" and row[0] != "root":
            faults.append(f"{row[0]} has uid 0")
    if (tree / "etc/shadow").exists():
        fields = [line.split(":")[1] for line in (tree / "etc/shadow").read_text(encoding="utf-8").splitlines()]
        faults += ["etc/shadow has a hash" for field in fields if field.strip("*!")]
    identity = tree / "etc/machine-id"
    # A link leads into the running machine, which gives each clone its own.
    given = "" if identity.is_symlink() else identity.read_text(encoding="ascii").strip()
    unique = ["etc/machine-id"] if given not in {"", "uninitialized"} else []
    unique += [name for name in ("var/lib/systemd/random-seed", "etc/hostid") if (tree / name).exists()]
    return [
        _judged("accounts", f"{len(rows)} accounts, none with a password, only 'user' with a shell", faults),
        _judged("identity", "no machine id and no random seed", unique),
    ]


def _files(tree: Path) -> Iterator[tuple[str, Path]]:
    for folder, _, names in os.walk(tree):
        for name in names:
            path = Path(folder) / name
            if stat.S_ISREG(path.lstat().st_mode):
                yield str(path.relative_to(tree)), path


def _secrets(tree: Path) -> Check:
    faults = [name for name, path in _files(tree) if _is_credential(path)]
    return _judged("keys", "no private key and no credentials", faults)


def _is_credential(path: Path) -> bool:
    # The standard library's tests are not in the image, so no key is there as an example either.
    return (
        path.name in _CREDENTIALS
        or path.name.startswith("ssh_host_")
        or (path.stat().st_size <= _MAX_KEY_FILE and _PRIVATE_KEY.search(path.read_bytes()) is not None)
    )


def _elf(tree: Path) -> list[Check]:
    found: dict[str, elf.Hardening] = {}
    broken = []
    for name, path in _files(tree):
        with path.open("rb") as file:
            if file.read(len(elf.MAGIC)) != elf.MAGIC:
                continue
            file.seek(0)
            try:
                found[name] = elf.hardening(file.read(_MAX_ELF))
            except (ValueError, OverflowError):
                broken.append(name)
    programs = {name: h for name, h in found.items() if h.pie is not None}
    relro = Counter(h.relro for h in found.values())
    return [
        _judged("elf", f"{len(found)} files, {len(programs)} of them programs", broken),
        _judged("elf-nx", "no executable stack", [n for n, h in found.items() if not h.nx]),
        _judged("elf-relro", f"{relro['full']} full, {relro['partial']} partial",
                [n for n, h in found.items() if h.relro == "none"]),
        _judged("elf-bind-now", "programs that bind all symbols at the start",
                [n for n, h in programs.items() if h.relro != "full"]),
        _judged("elf-pie", "programs can be loaded anywhere", [n for n, h in programs.items() if not h.pie]),
        _judged("elf-canary", "programs check their stacks", [n for n, h in programs.items() if not h.canary]),
        _judged("elf-search-path", "no RPATH or RUNPATH", [n for n, h in found.items() if h.search_path]),
    ]  # fmt: skip


def _bill(image: Image) -> Check:
    faults = []
    document = json.loads((image.folder / SBOM).read_text(encoding="utf-8"))
    components = document["components"]
    if (document["bomFormat"], document["specVersion"]) != ("CycloneDX", "1.6"):
        faults.append("it is no CycloneDX 1.6")
    for component in components:
        digest = component["hashes"][0]
        if (
            not component["version"]
            or digest["alg"] != "SHA-256"
            or not re.fullmatch("[0-9a-f]{64}", digest["content"])
        ):
            faults.append(component["name"])
    return _judged("sbom", f"CycloneDX 1.6, {len(components)} packages with version and SHA-256", faults)


def _budget(image: Image, entries: list[_Entry]) -> Check:
    size, faults = image.manifest.parts[ROOT].size, []
    if size > MAX_ROOT_BYTES:
        faults.append(f"{size >> 20} MiB are more than {MAX_ROOT_BYTES >> 20}")
    if len(entries) > MAX_FILES:
        faults.append(f"{len(entries)} entries are more than {MAX_FILES}")
    kernel = image.manifest.parts[KERNEL].size >> 20
    return _judged("budget", f"root {size >> 20} MiB with {len(entries)} entries, kernel {kernel} MiB", faults)
