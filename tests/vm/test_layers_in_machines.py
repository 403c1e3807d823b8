"""Layers and the way out, in real machines: a layer replaces nothing, and the network is what the host lets."""

import anyio
import pytest

from luminaguard.images.build import part_of, squash
from luminaguard.images.layers.store import DISK, LOCK, PARTS, SBOM, LayerManifest
from luminaguard.images.rootfs import Node, add_parents
from luminaguard.microvm.machine import Command
from luminaguard.runtime.rehearsal import PROXY_PORT

pytestmark = pytest.mark.vm
HELLO = b"#!/usr/bin/python3 -I\nimport os, sys\nprint('hello', os.getuid() > 0, sys.argv[1:])\n"
FETCH = f"""
import http.client, sys
for number in range(int(sys.argv[1])):
    c = http.client.HTTPConnection("127.0.0.1", {PROXY_PORT}, timeout=20)
    c.request("POST", "http://there.example/", body=b"x" * 100_000)
    a = c.getresponse()
    print(a.status, len(a.read()))
"""


def put(runtime, tree):
    """A layer of this tree, in the runtime's store; its id."""
    add_parents(tree)
    work = runtime.layers.folder / "work"
    work.mkdir(mode=0o700, parents=True)
    squash(tree, work / DISK)
    for name in (LOCK, SBOM):
        (work / name).write_text("{}")
    distribution = runtime.images.current().manifest.distribution
    manifest = LayerManifest("pypi", "hello", "1", ("hello",), distribution, 1,
                             {name: part_of(work / name) for name in PARTS})  # fmt: skip
    (work / "manifest.json").write_text(manifest.dumps())
    work.rename(runtime.layers.folder / manifest.digest)
    return manifest.digest


def run(runtime, workspace, *argv, **options):
    """What a command printed, and how it ended."""
    told = bytearray()

    async def output(_stream, data):
        told.extend(data)

    async def work():
        with anyio.fail_after(120):
            return await runtime.exec(workspace, Command(argv), output=output, **options)

    execution = anyio.run(work)
    return execution, told.decode()


def test_a_layer_adds_programs_and_replaces_none(runtime, workspace):
    layer = put(runtime, {
        "usr/bin/hello": Node("file", 0o755, HELLO), "usr/bin/cat": Node("file", 0o755, b"#!/bin/sh\necho replaced\n"),
        "usr/lib/python3.11/json/__init__.py": Node("file", 0o644, b"raise SystemExit('replaced')\n"),
        "usr/share/hello/data": Node("file", 0o644, b"data\n"),
    })  # fmt: skip
    script = ("hello a; cat /usr/share/hello/data a.txt; python3 -c 'import json; print(json.dumps(1))'; "
              "touch /usr/bin/x /usr/share/hello/x; ls -ld /usr/share/hello")  # fmt: skip
    execution, told = run(runtime, workspace, "sh", "-c", script, layer=layer)
    assert execution.outcome.exit_code == 0, told
    assert told.splitlines()[:5] == ["hello True ['a']", "data", "one", "two", "1"]
    assert told.count("Read-only file system") + told.count("Permission denied") == 2 and len(execution.changeset) == 0
    without, told = run(runtime, workspace, "sh", "-c", "hello; ls /usr/share/hello")
    assert without.outcome.exit_code != 0 and "hello True" not in told


def test_programs_reach_what_the_host_answers_and_nothing_else(runtime, workspace):
    seen = []

    async def outside(connection):
        data = bytearray()
        while b"x" * 100_000 not in data:
            data += await connection.receive()
        seen.append(bytes(data[:20]))
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000))
        await connection.end()

    execution, told = run(runtime, workspace, "python3", "-c", FETCH, "3", outside=lambda _labels: outside)
    assert told.splitlines() == ["200 300000"] * 3 and execution.outcome.exit_code == 0
    assert seen == [b"POST http://there.ex"] * 3
    execution, told = run(runtime, workspace, "python3", "-c", FETCH, "1")
    assert execution.outcome.exit_code == 1 and "Connection refused" in told


def test_a_program_that_abuses_the_way_out_hurts_itself_alone(runtime, workspace):
    abuse = f"""
import socket
ends = []
for _ in range(120):
    c = socket.create_connection(("127.0.0.1", {PROXY_PORT}), timeout=20)
    c.setblocking(False)
    try:
        c.send(bytes(1 << 20))
    except OSError:
        pass
    ends.append(c)
print("done")
"""

    async def outside(_connection):
        await anyio.sleep_forever()

    execution, told = run(runtime, workspace, "python3", "-c", abuse, outside=lambda _labels: outside)
    assert (execution.outcome.exit_code, told) == (0, "done\n")
