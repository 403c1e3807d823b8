"""A packed disk, shown as if all in it belonged to the machine's own user.

Each machine's user has another number, which is not known when a disk is packed; and a packed disk
serves many machines, all of which only read it. squashfs keeps the numbers of owners in a table at its
end, and where the table is in the superblock at its beginning; of Linux before 6.2 it cannot be mapped
in any other way. So the guest reads all but those two from the disk, and those two from memory: device
mapper joins them (Documentation/admin-guide/device-mapper/linear.rst).

      0        4096                     size - 4096   size
      | memory | the disk, as it is ... | memory      |

What is slow is done in the template (:func:`join`); a clone writes two blocks (:meth:`Joined.give_to`).
The fields are those of Documentation/filesystems/squashfs.rst and linux/dm-ioctl.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

__all__ = ["MEMORY", "Joined", "join"]

_BLOCK = 4096  # larger than a superblock, and what direct input and output is aligned to
MEMORY = 2 * _BLOCK
"""Bytes that a disk needs of the memory."""
_SECTOR = 512
_MAGIC, _ONE_OWNER, _NO_ATTRIBUTES = b"hsqs", b"\x01\0", b"\xff" * 8
_UNCOMPRESSED = 0x8000
_VERSION, _HEAD = (4, 0, 0), 312  # of struct dm_ioctl
_READ_ONLY = 1
_CREATE, _LOAD, _RESUME = (0xC138FD00 | number for number in (3, 9, 6))


class Joined:
    """One disk of ``size`` bytes, of which the first and the last block are in memory.

    Args:
        node: of both together, to be mounted.
        disk: of the disk.
        memory: of a block device in memory.
        offset: where in it the two blocks are, in bytes.
    """

    def __init__(self, node: str, disk: str, memory: str, offset: int, size: int) -> None:
        self.node = node
        self._disk, self._memory, self._offset = disk, memory, offset
        # Direct input and output wants whole blocks of memory too.
        room = ctypes.create_string_buffer(MEMORY + _BLOCK)
        start = -ctypes.addressof(room) % _BLOCK
        self._blocks = memoryview(room).cast("B")[start : start + MEMORY]
        self._table = size - _BLOCK
        owners = struct.pack("<HI", _UNCOMPRESSED | 4, 0)
        listed = self._table + len(owners)
        self._blocks[_BLOCK : _BLOCK + len(owners) + 8] = owners + struct.pack("<Q", self._table)
        # The kernel takes the list of tables for good only if it ends where the image does.
        self._place = struct.pack("<QQ", listed + 8, listed)

    def give_to(self, owner: int) -> None:
        """From the next mount on all belongs to this user and group.

        Raises:
            ValueError: the disk is no squashfs of one owner without extended attributes, or too large.
            OSError: the disk cannot be read.
        """
        blocks = self._blocks
        # Past the cache: what is behind the disk was changed since it was last read.
        disk = os.open(self._disk, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            if os.preadv(disk, [blocks[:_BLOCK]], 0) != _BLOCK:
                raise ValueError("the workspace's disk has no first block")
        finally:
            os.close(disk)
        superblock = bytes(blocks[:64])
        if (superblock[:4], superblock[26:28], superblock[56:]) != (_MAGIC, _ONE_OWNER, _NO_ATTRIBUTES):
            raise ValueError("the workspace's disk is no squashfs of one owner")
        if int.from_bytes(superblock[40:48], "little") > self._table:
            raise ValueError("the workspace's disk is larger than this machine takes")
        blocks[40:56] = self._place
        blocks[_BLOCK + 2 : _BLOCK + 6] = owner.to_bytes(4, "little")
        memory = os.open(self._memory, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.pwrite(memory, blocks, self._offset)
        finally:
            os.close(memory)


def join(name: str, disk: str, memory: str, offset: int, folder: str) -> Joined:
    """Make the device for one disk; raises OSError.

    Args:
        name: a new one, for device mapper.
        disk: the disk's node.
        memory: the node of a block device in memory.
        offset: where in it two blocks are free, in bytes.
        folder: where device nodes appear.
    """
    size = _size(disk) // _BLOCK * _BLOCK
    edge, middle = _BLOCK // _SECTOR, (size - 2 * _BLOCK) // _SECTOR
    memory_number, disk_number = _number(memory), _number(disk)
    table = (
        (0, edge, f"{memory_number} {offset // _SECTOR}"),
        (edge, middle, f"{disk_number} {edge}"),
        (edge + middle, edge, f"{memory_number} {offset // _SECTOR + edge}"),
    )
    control = os.open(f"{folder}/mapper/control", os.O_RDWR | os.O_CLOEXEC)
    try:
        number = _ask(control, _CREATE, name)
        _ask(control, _LOAD, name, table)
        _ask(control, _RESUME, name)
    finally:
        os.close(control)
    return Joined(f"{folder}/dm-{os.minor(number)}", disk, memory, offset, size)


def _ask(control: int, request: int, name: str, table: tuple[tuple[int, int, str], ...] = ()) -> int:
    """One request to device mapper; the device's number."""
    targets = b"".join(_target(*line) for line in table)
    head = struct.pack("<6IiIIIQ128s", *_VERSION, _HEAD + len(targets), _HEAD, len(table), 0, _READ_ONLY, 0, 0, 0,
                       name.encode())  # fmt: skip
    buffer = bytearray(head.ljust(_HEAD, b"\0") + targets)
    fcntl.ioctl(control, request, buffer, True)
    (device,) = struct.unpack_from("<Q", buffer, 40)
    return int(device)


def _target(start: int, length: int, parameters: str) -> bytes:
    """A ``struct dm_target_spec`` with its parameters, padded to eight bytes; both in sectors."""
    text = parameters.encode() + b"\0"
    text = text.ljust(-(-len(text) // 8) * 8, b"\0")
    return struct.pack("<QQiI16s", start, length, 0, 40 + len(text), b"linear") + text


def _number(node: str) -> str:
    device = os.stat(node).st_rdev
    return f"{os.major(device)}:{os.minor(device)}"


def _size(disk: str) -> int:
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
