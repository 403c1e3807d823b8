"""The guest behind the stand-in: speaks the guest protocol and knows a handful of commands by heart.

Its memory is a dictionary, saved and loaded with the machine. Of a disk it sees lines that begin with
``marker``: enough to tell which file was put behind it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
from typing import Any

from luminaguard.guest import frames
from luminaguard.guest.frames import Frame, FrameReader, encode

__all__ = ["Guest"]

_MARKER = re.compile(rb"marker [a-z]+\n")


class Guest:
    """One machine's guest; a thread runs :meth:`serve` for each connection.

    Args:
        memory: what it knows: ``files`` that were made, and how many random numbers were drawn.
        disks: the paths of its disks, which may be replaced meanwhile.
    """

    def __init__(self, memory: dict[str, Any], disks: dict[str, str]) -> None:
        self.memory = memory
        self._disks = disks

    def serve(self, connection: socket.socket) -> None:
        """Answer calls until the connection ends."""
        self._send(connection, frames.HELLO, 0, {"protocol": frames.PROTOCOL, "kernel": "none", "python": "none"})
        reader = FrameReader()
        while data := connection.recv(1 << 16):
            for frame in reader.feed(data):
                if frame.kind == frames.CALL:
                    call = json.loads(frame.payload)
                    self._call(connection, frame.channel, call["method"], call["params"])

    def _call(self, connection: socket.socket, channel: int, method: str, params: dict[str, Any]) -> None:
        if method == "wake":
            self.memory |= {
                "entropy": base64.b64decode(params["entropy"]).hex(), "hostname": params["hostname"],
                "disks": ["vdc", "vdb"] if params["layer"] else ["vdb"],
            }  # fmt: skip
            boot_id = {"boot_id": self._random()} if params["workspace"] else {}
            self._send(connection, frames.RESULT, channel, boot_id)
        elif method == "rest":
            self._send(connection, frames.RESULT, channel, {})
        elif method == "exec":
            self._exec(connection, channel, params["argv"])
        elif method == "changes":
            records = b"".join(map(_record, sorted(self.memory["files"])))
            self._data(connection, channel, frames.CHANGES, records)
            self._send(connection, frames.RESULT, channel, {"entries": len(self.memory["files"])})
        else:
            self._send(connection, frames.FAIL, channel, {"code": "unknown-method", "message": method})

    def _exec(self, connection: socket.socket, channel: int, argv: list[str]) -> None:
        output, status = b"", 0
        match argv:
            case ["true" | "/bin/true"]:
                pass
            case ["echo", *words]:
                output = " ".join(words).encode() + b"\n"
            case ["touch", name]:
                self.memory["files"].append(name)
            case ["test", "-e", name]:
                status = int(name not in self.memory["files"])
            case ["cat", "/proc/sys/kernel/random/uuid"]:
                output = self._random().encode() + b"\n"
            case ["cat", "/proc/sys/kernel/hostname"]:
                output = self.memory["hostname"].encode() + b"\n"
            case ["cat", "marker"]:
                output = self._marker()
            case ["sleep", _]:
                return
            case ["bash" | "python3" | "sh", "-c", _]:
                pass  # a warm-up
            case _:
                self._send(connection, frames.FAIL, channel, {"code": "not-found", "message": argv[0]})
                return
        self._data(connection, channel, frames.STDOUT, output)
        self._data(connection, channel, frames.STDERR, b"")
        self._send(connection, frames.RESULT, channel, {"exit": status, "out_of_memory": False})

    def _random(self) -> str:
        """Only as good as the entropy that came with ``wake``: clones that get the same one repeat it."""
        self.memory["drawn"] += 1
        return hashlib.sha256(f"{self.memory.get('entropy')} {self.memory['drawn']}".encode()).hexdigest()[:32]

    def _marker(self) -> bytes:
        for name in self.memory["disks"]:  # a layer hides what lies below it
            with open(self._disks[name], "rb") as disk:
                if found := _MARKER.search(disk.read(1 << 20)):
                    return found[0]
        return b""

    def _data(self, connection: socket.socket, channel: int, stream: int, data: bytes) -> None:
        if data:
            connection.sendall(encode(Frame(frames.DATA, channel, data, stream)))
        connection.sendall(encode(Frame(frames.EOF, channel, stream=stream)))

    def _send(self, connection: socket.socket, kind: int, channel: int, value: dict[str, Any]) -> None:
        connection.sendall(encode(Frame(kind, channel, json.dumps(value).encode())))


def _record(name: str) -> bytes:
    header = json.dumps({"p": name.removeprefix("/workspace/"), "t": "file", "m": 0o644, "s": 0}).encode()
    return struct.pack(">I", len(header)) + header
