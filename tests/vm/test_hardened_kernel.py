"""Machines on the kernel that is built here; they run where the test image has it: make test-hardened."""

import os

import anyio
import pytest

from luminaguard.errors import MachineError
from luminaguard.images.manifest import INITRAMFS, KERNEL, ROOT
from luminaguard.microvm.machine import boot
from luminaguard.microvm.port import BootSource
from luminaguard.microvm.template import placeholder

pytestmark = pytest.mark.vm


@pytest.fixture
def image(runtime):
    found = runtime.images.current()
    if found.manifest.kernel != "hardened":
        pytest.skip("the test image has the distribution's kernel")
    return found


def test_the_root_is_behind_verity_and_there_are_no_modules(home, workspace, image):
    script = "head -9 /proc/mounts; test -e /proc/modules && echo modules; uname -r"
    told = home.exec(workspace, "sh", "-c", script).json
    assert "/dev/dm-0 / squashfs ro" in told["stdout"]
    assert "modules" not in told["stdout"]
    assert told["stdout"].rstrip().endswith(image.manifest.kernel_release)


@pytest.mark.parametrize("place", ["first block", "a program", "the tree"])
def test_a_root_that_was_tampered_with_is_not_run(runtime, image, place):
    """As if somebody had changed it after the host has verified it."""
    with open(image.folder / ROOT, "rb") as file:
        root = bytearray(file.read())
    blocks = int(image.manifest.boot_options.split(" 4096 4096 ")[1].split()[0])
    if place == "first block":
        root[100] ^= 1
    elif place == "the tree":
        root[blocks * 4096 :] = bytes(len(root) - blocks * 4096)
    else:  # all of the interpreter and its library lie somewhere in here
        for block in range(1, blocks - 200):
            root[block * 4096 + 11] ^= 1

    async def start() -> None:
        fds = [image.open_part(KERNEL), image.open_part(INITRAMFS), os.memfd_create("root"), placeholder(b"")]
        os.write(fds[2], root)
        read_only = os.open(f"/proc/self/fd/{fds[2]}", os.O_RDONLY)
        ram = os.memfd_create("ram")
        os.ftruncate(ram, 256 << 20)
        source = BootSource(fds[0], fds[1], (read_only, fds[3], fds[3]), 256, image.manifest.boot_options)
        try:
            with anyio.fail_after(60):
                async with boot(runtime.hypervisor, source, ram, runtime.tracker):
                    pass
        finally:
            for fd in (*fds, read_only, ram):
                os.close(fd)

    with pytest.raises(MachineError, match="ended before it answered"):
        anyio.run(start)
