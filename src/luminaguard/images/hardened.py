"""Build a small guest kernel from the distribution's kernel sources, with all drivers in it and no modules.

The sources are a package like any other: apt verifies them, the lock of the image names them. What the
kernel has is in ``kernels/hardened.config``; every line of it must survive the kernel's own
configuration, so a name that a newer kernel does not know any more is an error and not a gap.

    <cache>/kernels/<digest of sources, configuration and compiler>/vmlinux, init, manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from luminaguard.errors import ImageBuildFailed, ImageTampered, Unavailable
from luminaguard.images import deb
from luminaguard.images.kernel import Kernel, vmlinux
from luminaguard.images.manifest import Part, open_verified

__all__ = ["TOOLS", "build_kernel", "compiler", "configuration"]

TOOLS = {"gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc", "tar": "tar",
         "xz": "xz-utils", "veritysetup": "cryptsetup-bin"}  # fmt: skip
"""What building needs, by the package that has it; and the header below."""
_HEADER, _HEADER_PACKAGE = Path("/usr/include/libelf.h"), "libelf-dev"
_EVERY_S = 2.0
_LOG_TAIL = 1500
_ENVIRONMENT = {
    "LC_ALL": "C", "KBUILD_BUILD_TIMESTAMP": "@0", "KBUILD_BUILD_USER": "luminaguard",
    "KBUILD_BUILD_HOST": "luminaguard", "KBUILD_BUILD_VERSION": "1",
}  # fmt: skip


def configuration() -> bytes:
    """The kernel's options, one a line; all others are off."""
    return (resources.files("luminaguard.images") / "kernels" / "hardened.config").read_bytes()


def first_program() -> bytes:
    """The source of what such a kernel starts."""
    return (resources.files("luminaguard.images") / "kernels" / "init.c").read_bytes()


def compiler() -> str:
    """The compiler's version, which decides what comes out.

    Raises:
        Unavailable: a tool that building needs is missing.
    """
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    missing += [] if _HEADER.is_file() else [_HEADER_PACKAGE]
    if missing:
        raise Unavailable(
            f"A kernel cannot be built here: {', '.join(sorted(missing))} are not installed.",
            hint=f"Run 'make kernel', or as root: apt-get install {' '.join(sorted(missing))}",
        )
    done = subprocess.run(("gcc", "--version"), capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    return done.stdout.splitlines()[0]


def build_kernel(sources: Path, folder: Path, step: Callable[[str], None]) -> Kernel:
    """The kernel of these sources and :func:`configuration`; from ``folder`` if it was built before.

    Args:
        sources: the package, checked against its lock.
        folder: where kernels are kept, and where the build takes place (2 GB for its duration).
        step: told in a few words how far it is.

    Raises:
        ImageBuildFailed: it cannot be configured or compiled; the end of the log is told.
        Unavailable: a tool is missing.
    """
    parts = (sources.name.encode(), configuration(), first_program(), compiler().encode(), Path(__file__).read_bytes())
    kept = folder / hashlib.sha256(b"\0".join(parts)).hexdigest()
    try:
        return _load(kept)
    except (OSError, ValueError, KeyError, TypeError, ImageTampered):
        pass  # there is none that is whole
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in folder.glob(".building-*"):  # whoever builds holds the store's lock: its builder is dead
        shutil.rmtree(leftover, ignore_errors=True)
    work = folder / f".building-{os.getpid()}"
    work.mkdir(mode=0o700)
    try:
        tree = _unpack(sources, work, step)
        release = _configure(tree)
        _compile(tree, step)
        elf = vmlinux((tree / "arch/x86/boot/bzImage").read_bytes())
        _keep(kept, work / "kept", release, {"vmlinux": elf, "init": _compile_init(tree)})
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _load(kept)


def _load(kept: Path) -> Kernel:
    facts = json.loads((kept / "manifest.json").read_text(encoding="ascii"))
    parts = {}
    for name in ("vmlinux", "init"):
        fd = open_verified(kept / name, Part(**facts["parts"][name]), kept)
        with os.fdopen(fd, "rb") as file:
            parts[name] = file.read()
    return Kernel(str(facts["release"]), parts["vmlinux"], [[], []], parts["init"])


def _keep(kept: Path, work: Path, release: str, parts: dict[str, bytes]) -> None:
    work.mkdir(mode=0o700)
    for name, data in parts.items():
        (work / name).write_bytes(data)
    described = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in parts.items()}
    facts = json.dumps({"release": release, "parts": described})
    (work / "manifest.json").write_text(facts, encoding="ascii")
    shutil.rmtree(kept, ignore_errors=True)
    work.rename(kept)


def _unpack(sources: Path, work: Path, step: Callable[[str], None]) -> Path:
    step("unpacking the kernel's sources")
    archive = next((data for member, data in deb.data_members(sources)
                    if member.isreg() and re.search(r"usr/src/linux-source-[^/]*(/[^/]*)?\.tar\.\w+$", member.name)),
                   None)  # fmt: skip
    if archive is None:
        raise ImageBuildFailed(f"{sources.name} has no kernel sources in it.", hint="Run 'apt-get update' as root.")
    subprocess.run(("tar", "-x", "--auto-compress", "-J", "-f", "-"), cwd=work, input=archive, check=True)
    (tree,) = (path for path in work.iterdir() if path.is_dir())
    return tree


def _configure(tree: Path) -> str:
    wanted = tree / "luminaguard.config"
    wanted.write_bytes(configuration())
    _make(tree, "-s", f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig")
    chosen = set((tree / ".config").read_text(encoding="ascii").splitlines())
    asked = [line for line in configuration().decode().splitlines() if line.startswith("CONFIG_")]
    lost = [line for line in asked
            if (f"# {line[:-2]} is not set" if line.endswith("=n") else line) not in chosen]  # fmt: skip
    if lost:
        raise ImageBuildFailed(
            f"This kernel does not take {len(lost)} of the options: {', '.join(lost[:5])}.",
            hint="Correct luminaguard/images/kernels/hardened.config for this version.",
        )
    return _make(tree, "-s", "kernelrelease").strip()


def _compile(tree: Path, step: Callable[[str], None]) -> None:
    log = tree.parent / "log"
    start, told = time.monotonic(), 0.0
    with log.open("wb") as out, subprocess.Popen(
        ("make", f"-j{os.cpu_count() or 1}", "bzImage"), cwd=tree, env=_environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        count = 0
        try:
            for line in process.stdout:
                out.write(line)
                count += line.startswith((b"  CC ", b"  AS ", b"  LD "))
                if time.monotonic() - start - told > _EVERY_S:
                    told = time.monotonic() - start
                    step(f"compiling the kernel: {count} files in {told:.0f} s (about 1,300)")
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        end = log.read_bytes()[-_LOG_TAIL:].decode("utf-8", "replace")
        raise ImageBuildFailed(f"The kernel cannot be compiled:\n{end}", hint="Check that 2 GB of disk are free.")


def _compile_init(tree: Path) -> bytes:
    """The first program, with nothing of a C library but what the kernel's sources bring along."""
    source = tree / "init.c"
    source.write_bytes(first_program())
    command = ("gcc", "-Os", "-Wall", "-Werror", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector",
               "-fno-asynchronous-unwind-tables", "-fno-ident", "-s", "-Wl,--build-id=none", "-Wl,-z,noexecstack",
               "-include", "tools/include/nolibc/nolibc.h", "-o", "init.elf", "init.c", "-lgcc")  # fmt: skip
    done = subprocess.run(command, cwd=tree, env=_environment(), capture_output=True, text=True, errors="replace",
                          check=False, stdin=subprocess.DEVNULL)  # fmt: skip
    if done.returncode:
        raise ImageBuildFailed(
            f"The first program of the machine cannot be compiled: {done.stderr[-_LOG_TAIL:]}",
            hint="Run 'make kernel', which installs what it needs.",
        )
    return (tree / "init.elf").read_bytes()


def _make(tree: Path, *arguments: str) -> str:
    done = subprocess.run(("make", *arguments), cwd=tree, env=_environment(), capture_output=True, text=True,
                          errors="replace", check=False, stdin=subprocess.DEVNULL)  # fmt: skip
    if done.returncode:
        raise ImageBuildFailed(
            f"The kernel cannot be configured: {done.stderr[-_LOG_TAIL:]}", hint="Check that 2 GB of disk are free."
        )
    return done.stdout


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), **_ENVIRONMENT}
