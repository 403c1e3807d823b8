"""Measure what people wait for, and print JSON: medians and p99, facts of this host, ratios to a baseline.

``.venv/bin/python bench/run.py [--quick] [NAME ...]``; names are the keys of the output. The
baseline of the machine numbers is a bare QEMU process of the same kind, from its start to its QMP
greeting, measured in the same run; of the command numbers, ``python -c pass``. Goals stand beside
the numbers; nothing fails when one is missed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio

import agents
import cliff
import fleet
import pool
import servers
import stdio
from luminaguard.effects.card import MAX_TEXT, make_card
from luminaguard.effects.changes import FileEntry
from luminaguard.errors import LuminaGuardError
from luminaguard.images import initramfs
from luminaguard.images.manifest import INITRAMFS, KERNEL, ROOT, Image
from luminaguard.microvm.machine import Command, boot, clone
from luminaguard.microvm.pool import PoolLimits
from luminaguard.microvm.port import BootSource
from luminaguard.microvm.qemu.probe import find_qemu
from luminaguard.microvm.template import placeholder
from luminaguard.runtime import Runtime
from luminaguard.settings import Folders, load_settings
from luminaguard.testing import Home
from luminaguard.workspaces.base import base_contents
from luminaguard.workspaces.blobs import BlobStore
from luminaguard.workspaces.collect import Collector
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.state import Limits, read_state

# Someone who develops may have turned byte code off; users have it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
QUICK = "--quick" in sys.argv
LIMITS = Limits(1_000_000, 1 << 34)


def spread(values_ms: list[float], goal_ms: float | None = None) -> dict[str, Any]:
    """Median, p99 and count of milliseconds."""
    ordered = sorted(values_ms)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    found: dict[str, Any] = {"p50_ms": round(statistics.median(ordered), 1), "p99_ms": round(p99, 1), "n": len(ordered)}
    if goal_ms is not None:
        found |= {"goal_p50_ms": goal_ms, "met": found["p50_ms"] <= goal_ms}
    return found


def times(count: int, action: Callable[[], object]) -> list[float]:
    """Milliseconds of each of ``count`` runs."""
    found = []
    for _ in range(max(3, count // 8) if QUICK else count):
        start = time.perf_counter()
        action()
        found.append((time.perf_counter() - start) * 1000)
    return found


async def _quiet(_stream: int, _data: bytes) -> None:
    return


@contextmanager
def confined_by_nothing() -> Iterator[None]:
    """Images that are built meanwhile have a supervisor that takes no right away from a command."""
    original = initramfs.supervisor_files

    def files() -> dict[str, bytes]:
        nothing = b"""

class Confinement:
    def __init__(self, profile="default"): pass
    def drop_privileges(self): pass
    def become(self, user): pass
    def seal(self, profile, *, packages=False): pass
"""
        found = {name: data for name, data in original().items() if not name.endswith(".pyc") or "confine." not in name}
        return found | {"confine.py": found["confine.py"] + nothing}

    initramfs.supervisor_files = files
    try:
        yield
    finally:
        initramfs.supervisor_files = original


class Bench:
    """Holds what several measurements share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folders = Folders.from_environment()
        self.runtime = Runtime(load_settings(folders), folders)
        _ = self.runtime.templates  # makes the key that the home is given
        self._make_home = partial(Home, cache=folders.cache, keys=folders.state / "keys")
        self.home = self._make_home(folder / "home")
        self.baselines: dict[str, float] = {}

    def facts(self) -> dict[str, Any]:
        """Of this host, beside every number."""
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in rows if x.startswith("model name")), "")
        hypervisor = self.runtime.hypervisor
        return {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "kernel": os.uname().release,
            "load": os.getloadavg()[0],
            "python": sys.version.split()[0],
            "backend": hypervisor.name,
            "qemu": find_qemu(self.runtime.settings.qemu).build,
            "accelerator": hypervisor.accelerator,
        }

    def baseline(self) -> dict[str, Any]:
        """What cannot be undercut here: the bare programs."""
        qemu = find_qemu(self.runtime.settings.qemu).path
        command = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-M", "microvm,accel=tcg", "-m", "256",
                   "-S", "-bios", "qboot.rom", "-qmp", "stdio"]  # fmt: skip

        def greeting() -> None:
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                process.kill()

        found = {
            "qemu_to_greeting": spread(times(20, greeting)),
            "python_pass": spread(times(20, lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))),
        }
        self.baselines = {name: value["p50_ms"] for name, value in found.items()}
        return found

    def cold_boot(self) -> dict[str, Any]:
        """From the start of QEMU to the supervisor's HELLO; beside it a kernel of our own, if an image has one."""
        images = {image.manifest.kernel: image for image in self.runtime.images.images()
                  if not image.manifest.container}  # fmt: skip
        images["current"] = self.runtime.images.current()
        laps: dict[str, list[float]] = {name: [] for name in images}
        for _ in range(2 if QUICK else 7):
            for name, image in images.items():
                laps[name].append(anyio.run(self._boot, image))
        found = spread(laps["current"], 2000) | {f"{name}_kernel": spread(values) for name, values in laps.items()}
        if {"distribution", "hardened"} <= laps.keys():
            ratio = statistics.median(laps["distribution"]) / statistics.median(laps["hardened"])
            found |= {"hardened_is_faster_by": round(ratio, 2), "goal_faster_by": 1.4}
        return found | self._ratio(found, "qemu_to_greeting")

    async def _boot(self, image: Image) -> float:
        with ExitStack() as stack:
            kernel, initramfs, root = (image.open_part(name) for name in (KERNEL, INITRAMFS, ROOT))
            empty, ram = placeholder(b""), os.memfd_create("ram")
            for fd in (kernel, initramfs, root, empty, ram):
                stack.callback(os.close, fd)
            os.ftruncate(ram, 256 << 20)
            source = BootSource(kernel, initramfs, (root, empty, empty), 256, image.manifest.boot_options)
            start = time.perf_counter()
            async with boot(self.runtime.hypervisor, source, ram, self.runtime.tracker):
                return (time.perf_counter() - start) * 1000

    def clone_to_true(self) -> dict[str, Any]:
        """From the start of QEMU to the end of the first /bin/true; and the wake alone."""
        workspace = self.folder / "small"
        workspace.mkdir(exist_ok=True)
        state = read_state(workspace, LIMITS)
        count = 6 if QUICK else 40

        async def all_of_them() -> tuple[list[float], list[float]]:
            image = self.runtime.images.current()
            root, disk = image.open_part(ROOT), WorkspaceImages(self.folder).open(state)
            woken, done = [], []
            hypervisor = self.runtime.hypervisor
            store = self.runtime.templates
            async with store.saved(hypervisor, image, 256, lambda _: None) as saved:
                for _ in range(count):
                    start = time.perf_counter()
                    async with clone(hypervisor, saved, (root, disk), self.runtime.tracker) as vm:
                        woken.append((time.perf_counter() - start) * 1000)
                        await vm.run(Command(["/bin/true"]), output=_quiet)
                        done.append((time.perf_counter() - start) * 1000)
            return woken, done

        woken, done = anyio.run(all_of_them)
        found = spread(done, 150) | {"woken": spread(woken)}
        return found | self._ratio(found, "qemu_to_greeting")

    def pool_hit(self) -> dict[str, Any]:
        """From asking a filled pool to the first /bin/true finished, jailed."""
        laps = anyio.run(pool.hit, self.runtime, self._small_disk(), 40 if QUICK else 270)
        found = spread(laps["true"], 30) | {"goal_p99_ms": 45, "met_p99": spread(laps["true"])["p99_ms"] <= 45}
        found |= {"woken": spread(laps["woken"]), "first_byte": spread(laps["first_byte"])}
        return found | self._ratio(found, "qemu_to_greeting")

    def idle_clones(self) -> dict[str, Any]:
        """What clones cost that only wait."""
        return anyio.run(pool.idle, self.runtime, 8 if QUICK else 50)

    def eight_callers(self) -> dict[str, Any]:
        """Eight callers at once on a small pool."""
        return anyio.run(pool.callers, self.runtime, self._small_disk(), 5 if QUICK else 60)

    def beside_us(self) -> dict[str, Any]:
        """Other ways to run ``true`` apart from one's files, in the same run; ours as ratios to them."""
        found = pool.peers(5 if QUICK else 20)
        found["plain_qemu_cold_boot"] = self._plain_cold_boot_ms()
        ours: dict[str, float] = {}
        for name, kept in (("hit", 4), ("miss", 0)):
            laps = anyio.run(lambda kept=kept: pool.hit(self.runtime, self._small_disk(), 12, kept=kept))
            for what, values in laps.items():
                ours[f"pool_{name}_to_{what}"] = round(statistics.median(values), 1)
        ratios = {name: {to: round(value / ms, 2) for to, ms in found.items() if isinstance(ms, float)}
                  for name, value in ours.items()}  # fmt: skip
        return {"beside_us_p50_ms": found, "ours_p50_ms": ours, "ours_to_each": ratios}

    def _plain_cold_boot_ms(self) -> float:
        """QEMU as it is, without jail, template or channel: our kernel to the first line of its first program."""
        qemu, image = find_qemu(self.runtime.settings.qemu), self.runtime.images.current()
        parts = {name: image.open_part(name) for name in (KERNEL, INITRAMFS)}
        command = [qemu.path, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "256",
                   "-M", "microvm,accel=tcg,isa-serial=on", "-bios", qemu.firmware, "-serial", "stdio",
                   "-kernel", f"/proc/self/fd/{parts[KERNEL]}", "-initrd", f"/proc/self/fd/{parts[INITRAMFS]}",
                   "-append", "console=ttyS0 quiet panic=-1 rdinit=/bin/echo"]  # fmt: skip

        def once() -> None:
            subprocess.run(command, pass_fds=tuple(parts.values()), capture_output=True, check=False, timeout=60)

        taken = statistics.median(times(3, once))
        for fd in parts.values():
            os.close(fd)
        return round(taken, 1)

    def _small_disk(self) -> int:
        workspace = self.folder / "small"
        workspace.mkdir(exist_ok=True)
        return WorkspaceImages(self.folder).open(read_state(workspace, LIMITS))

    def version(self) -> dict[str, Any]:
        """``luminaguard --version``."""
        found = spread(times(20, lambda: self.home.run("--version")), 120)
        return found | self._ratio(found, "python_pass")

    def exec_true(self) -> dict[str, Any]:
        """``luminaguard exec -- true`` end to end with a cached template, and where the time goes."""
        workspace = self.folder / "small"
        workspace.mkdir(exist_ok=True)
        self.home.exec(workspace, "true")
        laps: list[dict[str, float]] = []
        found = spread(times(12, lambda: laps.append(self.home.exec(workspace, "true").json["timings_ms"])), 700)
        found |= {"laps_p50_ms": {k: round(statistics.median(lap[k] for lap in laps), 1) for k in laps[0]}}
        return found | self._ratio(found, "python_pass")

    def workspace_10_mib(self) -> dict[str, Any]:
        """What 1,000 files of 10 KiB add to ``exec -- true``; new content each time, so nothing is cached."""
        small, large = self.folder / "small", self.folder / "large"
        large.mkdir(exist_ok=True)
        small.mkdir(exist_ok=True)

        def fill(large: Path = large) -> None:
            for number in range(1000):
                (large / f"f{number}").write_bytes(os.urandom(10 << 10))

        without, with_files = [], []
        for _ in range(2 if QUICK else 8):
            fill()
            without += times(1, lambda: self.home.exec(small, "true"))[:1]
            with_files += times(1, lambda: self.home.exec(large, "true"))[:1]
        added = [b - a for a, b in zip(without, with_files, strict=True)]
        found = spread(added, 600)
        return found | self._ratio(found, "python_pass")

    def workspace_500_mib(self) -> dict[str, Any]:
        """What 50,000 files with 520 MiB add: to the first call, to one that finds nothing changed, and to one
        machine of the pool on the same state."""
        large, small = self.folder / "huge", self.folder / "small"
        small.mkdir(exist_ok=True)
        count = 5_000 if QUICK else 50_000
        content = os.urandom(10_900)
        for number in range(count):
            path = large / f"d{number % 500}" / f"f{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content + number.to_bytes(4, "big"))
        time.sleep(2.5)  # what was written just now is never remembered
        self.home.exec(small, "true")
        base = statistics.median(times(5, lambda: self.home.exec(small, "true")))
        first = times(1, lambda: self.home.exec(large, "true", timeout_s=600))[0]
        later = times(5, lambda: self.home.exec(large, "true"))
        disk = WorkspaceImages(self.home.folder / "cache").open(read_state(large, LIMITS))
        laps = {name: anyio.run(pool.hit, self.runtime, fd, 12)["true"] for name, fd in
                (("small", self._small_disk()), ("large", disk))}  # fmt: skip
        on_state = statistics.median(laps["large"]) - statistics.median(laps["small"])
        return {
            "files": count,
            "first_call_added_ms": round(first - base, 1), "goal_first_ms": 5000,
            "unchanged_folder_added_ms": round(statistics.median(later) - base, 1),
            "pool_hit_on_the_state_added_ms": round(on_state, 1), "goal_later_ms": 60, "met": on_state <= 60,
        }  # fmt: skip

    def confinement(self) -> dict[str, Any]:
        """What seccomp, landlock, capabilities and limits add to a command: the same one in a machine without them."""
        with confined_by_nothing():
            base = self.folder / "unconfined"
            folders = Folders(base / "config", base / "state", base / "cache", base / "run").ensure()
            (folders.cache / "packages").symlink_to(self.runtime.images.packages)
            bare = Runtime(load_settings(folders), folders)
            bare.images.build(lambda _: None)
        laps: dict[str, list[float]] = {"confined": [], "bare": []}
        for _ in range(1 if QUICK else 3):
            for name, runtime in (("confined", self.runtime), ("bare", bare)):
                laps[name] += anyio.run(self._commands, runtime)
        bare.close()
        found = {name: spread(values) for name, values in laps.items()}
        added = round(found["confined"]["p50_ms"] - found["bare"]["p50_ms"], 1)
        return found | {"added_ms": added, "goal_added_ms": 3, "met": added <= 3}

    async def _commands(self, runtime: Runtime) -> list[float]:
        """Milliseconds from the order to the end of /bin/true, each in a clone of its own, whose launcher waits."""
        disk, laps = runtime.open_rehearsal(), []
        async with runtime.open_pool(PoolLimits(2, 2)) as kept:
            for _ in range(3 if QUICK else 20):
                await kept.wait_ready(1)
                await anyio.sleep(0.2)
                async with kept.machine(disk) as vm:
                    start = time.perf_counter()
                    await vm.run(Command(("/bin/true",)), output=_quiet)
                    laps.append((time.perf_counter() - start) * 1000)
        os.close(disk)
        return laps

    def audit(self) -> dict[str, Any]:
        """Of the built file, and of a running machine with the escape suite."""
        argv = self.home.argv("image", "audit", "--json")
        found = {}
        for name, flags, goal in (("file", [], 5000), ("live", ["--live"], 15_000)):
            took = times(3, lambda flags=flags: subprocess.run([*argv, *flags], env=self.home.environment, check=True,
                                                               stdout=subprocess.DEVNULL))  # fmt: skip
            found[name] = spread(took, goal)
        return found

    def _ratio(self, found: dict[str, Any], baseline: str) -> dict[str, float]:
        return {f"ratio_to_{baseline}": round(found["p50_ms"] / self.baselines[baseline], 1)}

    def card_10_000_files(self) -> dict[str, Any]:
        """The host's part of 100 changes in 10,000 files: entries and contents in, changeset and card out."""
        workspace = self.folder / "many"
        for number in range(10_000):
            path = workspace / f"d{number % 100}" / f"f{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"file {number}\n" * 20)
        state = read_state(workspace, LIMITS)
        (self.folder / "state").mkdir(exist_ok=True)
        blobs = BlobStore(self.folder / "state")
        changed = [path for path, entry in state.entries.items() if isinstance(entry, FileEntry)][:100]

        def once() -> None:
            collector = Collector(blobs.writer("bench"), LIMITS)
            for path in changed:
                content = f"changed {path}\n".encode() * 20
                collector.entry(path, "file", 0o644, len(content), "", False)
                collector.content(content)
            changeset = collector.changeset(state.entries)
            with base_contents(workspace, changeset, MAX_TEXT) as before:
                card = make_card(changeset, before, lambda sha: blobs.read("bench", sha, MAX_TEXT))
            assert len(card.items) == 100

        found = spread(times(20, once), 300)
        return found | self._ratio(found, "python_pass")

    def cliff(self) -> dict[str, Any]:
        """Judging 100 changed files, publishing them after an approval, and the terminal interface, headless."""
        count = 5 if QUICK else 40
        base = self.folder / "cliff"
        folders = Folders(base / "config", base / "state", base / "cache", base / "run").ensure()
        runtime = Runtime(load_settings(folders), folders)
        found = {"judge": spread(cliff.judging(runtime, base, count)),
                 "publish_100_files": spread(cliff.publishing(runtime, base, count), 150)}  # fmt: skip
        laps = cliff.interface(runtime, base, 20 if QUICK else 300)
        runtime.close()
        found["first_paint"] = spread(laps["first_paint"], 300)
        found["frame_of_10,000_lines"] = spread(laps["frame"], 16)
        key = spread(laps["key_to_screen"])
        return found | {"key_to_screen": key | {"goal_p99_ms": 50, "met": key["p99_ms"] <= 50}}

    def agents(self) -> dict[str, Any]:
        """Our part of a turn, tasks that wait, and the way to the first request of a model."""
        base = self.folder / "agents"
        folders = Folders(base / "config", base / "state", base / "cache", base / "run").ensure()
        runtime = Runtime(load_settings(folders), folders)
        found: dict[str, Any] = {"turn": spread(agents.turns(runtime, base, 20 if QUICK else 200), 5),
                                 "waiting": agents.waiting(runtime, base, 20 if QUICK else 200)}  # fmt: skip
        runtime.close()
        first = agents.first_request({"LUMINAGUARD_HOME": str(base / "home")}, base, 3 if QUICK else 10)
        return found | {"run_to_first_request": spread(first, 1200)}

    def fleet(self) -> dict[str, Any]:
        """Our part of a turn with PostgreSQL, and the steps a second of one worker."""
        found = fleet.measure(self.folder, count=20 if QUICK else 200, tasks=5 if QUICK else 40)
        if found is None:
            return {"skipped": "PostgreSQL is not installed"}
        return {"turn": spread(found.pop("turns_ms"), 10)} | found

    def mcp_stdio(self) -> dict[str, Any]:
        """Calls of MCP servers over standard input and output: the bare SDK, our client, and a server in a machine."""
        home = self._make_home(self.folder / "stdio-home")
        return stdio.measure(home, self.folder / "stdio", calls=100 if QUICK else 1000)

    def mcp(self) -> dict[str, Any]:
        """Calls of MCP servers over HTTP: the bare SDK, our client, the gateway; and balancing under faults."""
        return servers.measure(self.folder, calls=100 if QUICK else 500)


_NAMES = ("cold_boot", "clone_to_true", "pool_hit", "idle_clones", "eight_callers", "beside_us", "version", "exec_true",
          "workspace_10_mib", "workspace_500_mib", "card_10_000_files", "confinement", "audit", "cliff", "agents",
          "fleet", "mcp", "mcp_stdio")  # fmt: skip


def main() -> None:
    """Run what was asked for, or everything."""
    if {"--help", "-h"} & set(sys.argv):
        print(f"bench/run.py [--quick] [NAME...]\nnames: {', '.join(_NAMES)}")
        return
    wanted = [name for name in sys.argv[1:] if not name.startswith("-")]
    with tempfile.TemporaryDirectory(prefix="luminaguard-bench-") as folder:
        bench = Bench(Path(folder))
        report: dict[str, Any] = {"host": bench.facts(), "baseline": bench.baseline()}
        for name in _NAMES:
            if not wanted or name in wanted:
                print(f"measuring {name} ...", file=sys.stderr, flush=True)
                try:
                    report[name] = getattr(bench, name)()
                except LuminaGuardError as error:  # the others were measured, and are told
                    report[name] = {"failed": str(error)}
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
