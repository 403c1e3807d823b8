"""The initramfs: modules, busybox, the guest supervisor, and the few lines that start it.

It mounts the read-only root, copies the supervisor where the workload cannot read it, and hands over.
"""

from __future__ import annotations

import importlib.util
import itertools
import marshal
from importlib import resources

from luminaguard.images import cpio, imported, verity

__all__ = ["SUPERVISOR_FOLDER", "VSOCK_OPTION", "build", "supervisor_files"]

SUPERVISOR_FOLDER = "/run/luminaguard"
VSOCK_OPTION = "lumina.vsock"
"""On the kernel's command line: the host is to be reached by vsock."""
_MEMORY_DISK = "rd_nr=1 rd_size=16"
"""One, of 16 KiB: all that changes the owner of a workspace's files (guest/ownership.py)."""
_INIT = r"""#!/bin/busybox sh
set -eu
trap 'echo "init failed" ; /bin/busybox poweroff -f' EXIT
b=/bin/busybox
$b mount -t devtmpfs -o nosuid,noexec dev /dev
$b mount -t proc -o nosuid,nodev,noexec proc /proc
for m in {modules}; do
  case $m in brd) options="{memory}" ;; *) options= ;; esac
  $b insmod "/modules/$m.ko" $options
done
read -r line < /proc/cmdline
case " $line " in *" {vsock} "*) for m in {vsock_modules}; do $b insmod "/modules/$m.ko"; done ;; esac
root=/dev/vda
case " $line " in *" {verity}"*) root=/dev/dm-0 ;; esac
$b mount -t squashfs -o ro,nosuid,nodev "$root" /root
$b mount -t tmpfs -o nosuid,nodev,noexec,mode=755,size=4m,nr_inodes=1024 tmpfs /root/run
$b mkdir -m 700 /root{folder}
$b cp -r /luminaguard /root{folder}/
$b umount /proc
$b mount --move /dev /root/dev
python=/usr/bin/python3
case " $line " in *" {runtime} "*) python="{interpreter}" ;; esac
export LC_ALL=C TZ=/dev/null
exec $b switch_root /root $python {arguments} -c "{program}"
"""
_ARGUMENTS = ("-I", "-S", "-E", "-B")
_PROGRAM = (
    f"import sys; sys.path.insert(0, '{SUPERVISOR_FOLDER}'); from luminaguard.guest.supervisor import main; main()"
)


def supervisor_files() -> dict[str, bytes]:
    """The guest package by file name: its sources, and their byte code for this Python."""
    files = {"__init__.py": b""}
    for entry in sorted(resources.files("luminaguard.guest").iterdir(), key=lambda e: e.name):
        if not entry.name.endswith(".py") or entry.name == "__init__.py":
            continue
        source = entry.read_bytes()
        files[entry.name] = source
        code = compile(source, f"{SUPERVISOR_FOLDER}/luminaguard/guest/{entry.name}", "exec", dont_inherit=True)
        header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little")
        cached = importlib.util.cache_from_source(entry.name)
        files[cached] = header + importlib.util.source_hash(source) + marshal.dumps(code, 2)
    return files


def build(busybox: bytes, modules: list[list[tuple[str, bytes]]], init: bytes = b"") -> bytes:
    """The whole archive, uncompressed: unpacking costs more than reading under emulation.

    Args:
        busybox: a static one.
        modules: those to load always, and those to load with :data:`VSOCK_OPTION`.
        init: instead of both, a program that does what the shell would do (``kernels/init.c``).
    """
    archive = cpio.Newc()
    for folder in ("dev", "proc", "root", "luminaguard", "luminaguard/guest", "luminaguard/guest/__pycache__"):
        archive.add(folder, 0o040755, b"")
    archive.add("luminaguard/__init__.py", 0o100644, b"")
    for name, data in supervisor_files().items():
        archive.add(f"luminaguard/guest/{name}", 0o100644, data)
    if init:
        archive.add("init", 0o100755, init)
        for name, python in (("supervisor", ("/usr/bin/python3",)), ("supervisor.container", imported.interpreter())):
            words = (*python, *_ARGUMENTS, "-c", _PROGRAM)
            archive.add(name, 0o100644, "".join(f"{word}\0" for word in words).encode())
        return archive.finish()
    for folder in ("bin", "modules"):
        archive.add(folder, 0o040755, b"")
    archive.add("bin/busybox", 0o100755, busybox)
    archive.add("init", 0o100755, _script(modules).encode())
    for name, data in itertools.chain(*modules):
        archive.add(f"modules/{name}.ko", 0o100644, data)
    return archive.finish()


def _script(modules: list[list[tuple[str, bytes]]]) -> str:
    always, with_vsock = (" ".join(name for name, _ in group) for group in modules)
    words = {"modules": always, "memory": _MEMORY_DISK,
             "vsock_modules": with_vsock, "vsock": VSOCK_OPTION, "folder": SUPERVISOR_FOLDER,
             "arguments": " ".join(_ARGUMENTS), "program": _PROGRAM, "verity": verity.DEVICE,
             "runtime": imported.RUNTIME_OPTION, "interpreter": " ".join(imported.interpreter())}  # fmt: skip
    init = _INIT
    for name, word in words.items():
        init = init.replace(f"{{{name}}}", word)
    return init
