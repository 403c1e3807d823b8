"""The warm pool and the records of machines: real clones, killed, stopped, expired and lent."""

import json
import os
import signal
import subprocess
import time
import uuid
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest

from luminaguard.errors import ImageMissing, MachineError
from luminaguard.microvm import machine as machines
from luminaguard.microvm.broker import Lender, borrow
from luminaguard.microvm.jail import CgroupStore
from luminaguard.microvm.machine import Command
from luminaguard.microvm.pool import Pool, PoolLimits, Template
from luminaguard.microvm.tracker import VMTracker
from luminaguard.microvm.usage import start_time, usage
from luminaguard.testing.machines import alive, output_of, until
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.state import Limits, read_state

pytestmark = pytest.mark.vm
GONE_S = float(
    os.environ.get("LUMINAGUARD_TEST_GONE_S", "10")
)  # 2 s is the promise; a test waits longer on a busy machine
CLONES = int(os.environ.get("LUMINAGUARD_TEST_CLONES", "16"))


@pytest.fixture
def disk(runtime, workspace):
    fd = WorkspaceImages(runtime.folders.cache).open(read_state(workspace, Limits(1000, 1 << 30)))
    yield fd
    os.close(fd)


def run(function, *arguments):
    async def bounded():
        with anyio.fail_after(max(150, 2 * CLONES)):
            await function(*arguments)

    anyio.run(bounded)


def test_a_hit_works_on_the_callers_workspace_and_is_used_once(runtime, disk, workspace):
    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(2, 2)) as pool:
            await pool.wait_ready(2)
            seen = []
            for _ in range(4):
                await pool.wait_ready(1)
                async with pool.machine(disk) as vm:
                    seen.append(vm.id)
                    pid = vm.process.pid
                    said = await output_of(vm, "sh", "-c", "cat a.txt; touch was-here; cat /proc/sys/kernel/hostname")
                    assert said == f"one\ntwo\n{vm.id}\n"
                await until(lambda pid=pid: not alive(pid))
            assert len(set(seen)) == 4
            assert (pool.status.hits, pool.status.misses, pool.status.in_use) == (4, 0, 0)
        assert runtime.tracker.running() == []

    run(scenario)


def test_a_miss_gets_a_machine_of_its_own(runtime, disk):
    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(0, 0)) as pool:
            async with pool.machine(disk) as vm:
                assert await output_of(vm, "cat", "a.txt") == "one\ntwo\n"
                assert set(vm.process.layers.values()) <= {"on"} or os.geteuid() != 0
            assert (pool.status.hits, pool.status.misses, pool.status.ready) == (0, 1, 0)
            assert (pool.status.waiting, pool.status.in_use) == (0, 0)

    run(scenario)


HYGIENE = """
import json, os, random, ssl, socket, tempfile, time, uuid
def context(side):
    made = ssl.SSLContext(side)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    made.maximum_version = ssl.TLSVersion.TLSv1_2
    made.set_ciphers("aNULL:@SECLEVEL=0")
    return made
to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
client = context(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(to_client, to_server)
server = context(ssl.PROTOCOL_TLS_SERVER).wrap_bio(to_server, to_client, server_side=True)
for _ in range(4):
    for end in (client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
print(json.dumps({
    "random": os.urandom(16).hex(), "uuid": str(uuid.uuid4()), "random module": random.random(),
    "boot id": open("/proc/sys/kernel/random/boot_id").read(), "machine id": open("/etc/machine-id").read(),
    "kernel uuid": open("/proc/sys/kernel/random/uuid").read(), "host name": socket.gethostname(),
    "hash seed": hash("luminaguard"), "temporary name": tempfile.mktemp(), "tls random": ssl.RAND_bytes(16).hex(),
    "tls session": client.session.id.hex(), "tls channel": client.get_channel_binding("tls-unique").hex(),
    "clock": time.time()}))
"""


@pytest.mark.slow
def test_no_two_clones_share_anything_random(runtime, disk):
    """Rehearsed clones and on-demand ones, from one template."""

    async def scenario() -> None:
        seen: list[dict[str, object]] = []
        late: list[float] = []
        async with runtime.open_pool(PoolLimits(2, 2)) as pool:
            for number in range(CLONES):
                if number % 2:
                    await pool.wait_ready(1)
                async with pool.machine(disk) as vm:
                    before = time.time()
                    clock = float(await output_of(vm, "date", "+%s.%N"))
                    late.append(max(before - clock, clock - time.time(), 0.0))
                    seen.append(json.loads(await output_of(vm, "python3", "-c", HYGIENE)))
        for name in seen[0]:
            assert len({str(values[name]) for values in seen}) == CLONES, name
        assert max(late) <= 0.05, late

    run(scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_clone_that_dies_or_hangs_while_it_waits_is_not_handed_out(runtime, disk, number, monkeypatch):
    monkeypatch.setattr(machines, "WATCH_S", 0.3)
    monkeypatch.setattr("luminaguard.microvm.qemu.qmp.ANSWER_TIMEOUT_S", 1.0)

    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(1, 1)) as pool:
            await pool.wait_ready(1)
            (victim,) = runtime.tracker.running()
            os.kill(victim.pid, number)
            async with pool.machine(disk) as vm:
                assert vm.id != victim.id
                assert await output_of(vm, "cat", "a.txt") == "one\ntwo\n"
            await until(lambda: not alive(victim.pid))
            await pool.wait_ready(1)
            assert pool.status.died == 1

    run(scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_hypervisor_that_dies_or_hangs_in_use_is_an_error_and_nothing_is_left(runtime, disk, number, monkeypatch):
    monkeypatch.setattr(machines, "WATCH_S", 0.3)
    monkeypatch.setattr("luminaguard.microvm.qemu.qmp.ANSWER_TIMEOUT_S", 1.0)

    async def scenario() -> None:
        pid = 0
        async with runtime.open_pool(PoolLimits(1, 1)) as pool:
            await pool.wait_ready(1)
            with pytest.raises(MachineError) as caught:
                async with pool.machine(disk) as vm:
                    pid = vm.process.pid

                    async def output(_stream: int, _data: bytes) -> None:
                        os.kill(pid, number)

                    await vm.run(Command(("sh", "-c", "echo; sleep 600")), output=output)
            assert "ended before it answered" in caught.value.message
            await until(lambda: not alive(pid))
            assert pool.status.in_use == 0

    run(scenario)


async def crash_the_supervisor(pool, vm) -> None:
    """Bytes that are no frames end PID 1, and with it the guest's kernel: a real panic."""
    vm._channel._socket.send(b"\xff" * 64)


async def reset_the_machine(pool, vm) -> None:
    (kept,) = [kept for kept in KEPT if kept.id == vm.id]
    await kept.machine._qmp.execute("system_reset")


KEPT: list = []


@pytest.mark.parametrize("crash", [crash_the_supervisor, reset_the_machine])
def test_a_guest_that_panics_or_resets_is_an_error_and_its_machine_ends(runtime, disk, crash):
    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(1, 1)) as pool:
            await pool.wait_ready(1)
            KEPT[:] = pool._ready
            with pytest.raises(MachineError):
                async with pool.machine(disk) as vm:
                    pid = vm.process.pid

                    async def output(_stream: int, _data: bytes) -> None:
                        await crash(pool, vm)

                    await vm.run(Command(("sh", "-c", "echo; sleep 600")), output=output)
            await until(lambda: not alive(pid))

    run(scenario)


def test_old_clones_expire_and_new_ones_take_their_place(runtime, disk):
    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(1, 1, max_age_s=2.0)) as pool:
            await pool.wait_ready(1)
            (first,) = runtime.tracker.running()
            await until(lambda: pool.status.expired >= 1)
            await until(lambda: not alive(first.pid))
            await pool.wait_ready(1)
            async with pool.machine(disk) as vm:
                assert vm.id != first.id

    run(scenario)


def test_a_new_template_replaces_every_waiting_clone_and_disturbs_no_running_one(runtime, disk):
    version = 1

    @asynccontextmanager
    async def templates():
        key = f"v{version}"
        async with runtime._pool_template() as template:
            yield Template(key, template.saved, template.root, template.rehearsal)

    async def scenario() -> None:
        nonlocal version
        limits = PoolLimits(2, 2)
        async with Pool.open(runtime.hypervisor, templates, lambda: f"v{version}", runtime.tracker, limits) as pool:
            await pool.wait_ready(2)
            async with pool.machine(disk) as vm:
                old = {record.id for record in runtime.tracker.running()}
                version = 2
                await until(lambda: pool.status.template == "v2")
                async with pool.machine(disk) as second:  # others are served while the first still works
                    assert second.id not in old
                    assert await output_of(second, "cat", "a.txt") == "one\ntwo\n"
                assert await output_of(vm, "cat", "a.txt") == "one\ntwo\n"
            await pool.wait_ready(2)
            await until(lambda: not old & {record.id for record in runtime.tracker.running()})

    run(scenario)


def test_an_image_that_vanishes_does_not_end_those_who_run(runtime, disk):
    broken = False

    def current() -> str:
        if broken:
            raise ImageMissing("no image.", hint="build one")
        return key

    async def scenario() -> None:
        nonlocal broken
        async with Pool.open(
            runtime.hypervisor, runtime._pool_template, current, runtime.tracker, PoolLimits(1, 1)
        ) as pool:
            await pool.wait_ready(1)
            async with pool.machine(disk) as vm:
                broken = True
                await until(lambda: pool.status.failures > 0)
                assert await output_of(vm, "cat", "a.txt") == "one\ntwo\n"
            broken = False
            await pool.wait_ready(1)

    async def find() -> None:
        nonlocal key
        async with runtime._pool_template() as template:
            key = template.key

    key = ""
    run(find)
    run(scenario)


def test_a_workspace_that_no_clone_can_mount_does_not_use_up_the_pool(runtime, disk, tmp_path):
    bad = tmp_path / "bad.squashfs"
    bad.write_bytes(b"no file system" * 1000)
    fd = os.open(bad, os.O_RDONLY)

    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(4, 4)) as pool:
            await pool.wait_ready(4)
            with pytest.raises(MachineError, match="could not do its part"):
                async with pool.machine(fd):
                    pass
            assert pool.status.ready >= 2
            async with pool.machine(disk) as vm:
                assert await output_of(vm, "cat", "a.txt") == "one\ntwo\n"

    run(scenario)
    os.close(fd)


@pytest.mark.slow
def test_a_template_is_really_rebuilt_under_load_and_nobody_notices(runtime, disk):
    """Another memory size: a machine is booted and saved while four callers go on."""
    sizes: list[int] = []

    def key(mib: int) -> str:
        return runtime.templates.key(runtime.hypervisor, runtime.images.current(), mib)

    async def scenario() -> None:
        over = False
        parts = (runtime.hypervisor, runtime._pool_template, lambda: key(runtime.settings.memory_mib), runtime.tracker)
        async with Pool.open(*parts, PoolLimits(2, 4)) as pool:
            await pool.wait_ready(1)

            async def caller() -> None:
                while not over:
                    async with pool.machine(disk) as vm:
                        sizes.append(int(await output_of(vm, "awk", "/MemTotal/ {print $2}", "/proc/meminfo")))

            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(caller)
                await until(lambda: len(sizes) >= 8, 90)
                # A size of which there is no template.
                other = next(mib for mib in range(300, 400) if not runtime.templates.exists(key(mib)))
                runtime.settings = runtime.settings.model_copy(update={"memory_mib": other})
                await until(lambda: pool.status.template == key(other), 90)
                seen = len(sizes)
                await until(lambda: len(sizes) >= seen + 8, 90)
                over = True
            assert pool.status.failures == 0
        assert sizes[0] < 256 << 10 < sizes[-1]

    run(scenario)


def test_after_the_computer_slept_nobody_gets_a_clone_from_before(runtime, disk):
    slept = 0.0

    def clock() -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) + slept

    def current() -> str:
        return runtime.templates.key(runtime.hypervisor, runtime.images.current(), runtime.settings.memory_mib)

    async def scenario() -> None:
        nonlocal slept
        parts = (runtime.hypervisor, runtime._pool_template, current, runtime.tracker, PoolLimits(2, 2, 600))
        async with Pool.open(*parts, clock=clock) as pool:
            await pool.wait_ready(2)
            old = {record.id for record in runtime.tracker.running()}
            slept = 8 * 3600
            async with pool.machine(disk) as vm:
                assert vm.id not in old
            await until(lambda: pool.status.expired == 2)
            await pool.wait_ready(2)

    run(scenario)


@pytest.mark.slow
def test_a_pool_that_was_frozen_with_its_machines_goes_on(home, workspace):
    """As a suspended computer is: everything stands still, and then the clocks are behind."""
    with home.serving() as lender:
        machines_now = [vm["pid"] for vm in home.run("vm", "list", "--json").json["vms"]]
        for pid in (lender.pid, *machines_now):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(7)  # longer than a hypervisor may take to answer
        for pid in (lender.pid, *machines_now):
            os.kill(pid, signal.SIGCONT)
        before = time.time()
        told = home.exec(workspace, "date", "+%s.%N").json
        assert before - 0.05 <= float(told["stdout"]) <= time.time() + 0.05
        assert pool_status(home)["status"]["died"] == 0
        assert pool_status(home)["status"]["hits"] == 1


def test_a_hypervisor_at_the_memory_limit_of_its_cgroup_is_one_typed_error(runtime, disk, monkeypatch):
    if CgroupStore().missing:
        pytest.skip("no cgroups for this user")
    # So that the guest's own memory does not fit: twice 256 of it and 256 for translated code, less this.
    monkeypatch.setattr("luminaguard.microvm.qemu.backend._OVERHEAD_MIB", -620)
    fill = "kept = [bytearray(b'x' * (1 << 20)) for _ in range(160)]; print('all of it')"

    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(0, 0)) as pool:
            with pytest.raises(MachineError):
                async with pool.machine(disk) as vm:
                    await output_of(vm, "python3", "-c", fill)
        (ended,) = (record for record in runtime.tracker.ended() if record.id == vm.id)
        assert (ended.reason, ended.exit_status) == ("the hypervisor ended", 137)
        assert vm.id not in CgroupStore().groups()

    run(scenario)


@pytest.mark.slow
def test_host_memory_is_not_multiplied_by_the_clones_of_a_large_workspace(runtime, tmp_path):
    """200 MiB of files, six machines on them: what each has for itself is not the workspace."""
    large = tmp_path / "large"
    large.mkdir()
    for number in range(200):
        (large / f"f{number}").write_bytes(os.urandom(1 << 20))

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            fd = WorkspaceImages(runtime.folders.cache).open(read_state(large, Limits(1000, 1 << 30)))
            stack.callback(os.close, fd)
            pool = await stack.enter_async_context(runtime.open_pool(PoolLimits(0, 0)))
            machines_now = [await stack.enter_async_context(pool.machine(fd)) for _ in range(6)]
            for vm in machines_now:
                assert (await output_of(vm, "sh", "-c", "ls | wc -l; cat f7 | wc -c")).split() == ["200", "1048576"]
            private = [usage(vm.process.pid).private for vm in machines_now]
            assert max(private) < 150 << 20, private  # a machine without any workspace has about 60 to 100 MiB

    run(scenario)


def test_a_template_that_cannot_be_made_is_told_to_the_caller_and_tried_again(runtime, disk):
    broken = True

    @asynccontextmanager
    async def templates():
        if broken:
            raise MachineError("no template today.", hint="wait")
        async with runtime._pool_template() as template:
            yield template

    def current() -> str:
        return runtime_key

    async def scenario() -> None:
        nonlocal broken
        limits = PoolLimits(1, 1)
        async with Pool.open(runtime.hypervisor, templates, current, runtime.tracker, limits) as pool:
            with pytest.raises(MachineError, match="no template today"):
                async with pool.machine(disk):
                    pass
            broken = False
            await pool.wait_ready(1)
            assert pool.status.failures >= 1

    async def key() -> None:
        nonlocal runtime_key
        async with runtime._pool_template() as template:
            runtime_key = template.key

    runtime_key = ""
    run(key)
    run(scenario)


def test_demand_grows_the_pool_and_quiet_shrinks_it(runtime, disk, monkeypatch):
    monkeypatch.setattr("luminaguard.microvm.pool._DEMAND_WINDOW_S", 4.0)

    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(0, 4)) as pool:
            await anyio.sleep(0.5)
            assert pool.status.ready == 0
            for _ in range(6):
                async with pool.machine(disk) as vm:
                    await output_of(vm, "true")
            await until(lambda: pool.status.ready >= 1)
            assert pool.status.target >= 2
            await until(lambda: pool.status.ready == 0 and pool.status.target == 0)

    run(scenario)


def test_a_pool_is_refilled_while_callers_keep_coming(runtime, disk):
    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(1, 4)) as pool:
            await pool.wait_ready(1)

            async def caller() -> None:
                for _ in range(8):
                    async with pool.machine(disk) as vm:
                        await output_of(vm, "true")

            async with anyio.create_task_group() as callers:
                for _ in range(3):
                    callers.start_soon(caller)
            assert pool.status.made >= 3  # with the first one only, all but one had waited
            assert pool.status.hits >= 2

    run(scenario)


def test_memory_bounds_the_pool():
    assert PoolLimits(1, 100, memory_mib=960).most == 10
    assert PoolLimits(1, 100, memory_mib=0).most == 0


def test_a_caller_who_goes_away_at_any_moment_leaves_nothing(runtime, disk):
    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(1, 1)) as pool:
            for milliseconds in (0, 1, 3, 8, 15, 30, 60, 120):
                with anyio.move_on_after(milliseconds / 1000):
                    async with pool.machine(disk) as vm:
                        await output_of(vm, "sleep", "5")
            await until(lambda: pool.status.in_use == 0 and pool.status.waiting == 0)
            async with pool.machine(disk) as vm:
                assert await output_of(vm, "cat", "a.txt") == "one\ntwo\n"
        assert runtime.tracker.running() == []

    run(scenario)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_eight_callers_at_once_leak_nothing(runtime, disk):
    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(2, 4)) as pool:
            await pool.wait_ready(1)

            async def caller() -> None:
                for _ in range(3):
                    async with pool.machine(disk) as vm:
                        assert await output_of(vm, "cat", "sub/b.txt") == "b\n"

            async with anyio.create_task_group() as callers:
                for _ in range(8):
                    callers.start_soon(caller)
            assert pool.status.hits + pool.status.misses == 24

    runtime.hypervisor  # noqa: B018  # what is opened once is no leak
    before = descriptors()
    run(scenario)
    assert descriptors() <= before
    assert runtime.tracker.running() == []


# -- lending -------------------------------------------------------------------------------------------


def pool_status(home):
    found = home.run("pool", "status", "--json").json
    return found if found["running"] else None


def test_exec_takes_its_machine_from_a_served_pool(home, workspace):
    with home.serving():
        result = home.exec(workspace, "sh", "-c", "cat a.txt; echo new > n; exit 3", flags=("--publish", "always"))
        assert (result.code, result.json["stdout"]) == (3, "one\ntwo\n")
        assert (workspace / "n").read_text() == "new\n"
        assert pool_status(home)["status"]["hits"] == 1
        other = home.exec(workspace, "true", flags=("--memory", "192"), timeout_s=170)
        assert other.code == 0
        assert pool_status(home)["status"]["hits"] == 1
        second = home.run("pool", "serve")
        assert second.code == 123
        assert "Another process" in second.err
    assert pool_status(home) is None
    assert home.run("vm", "list", "--json").json == {"vms": []}
    assert home.exec(workspace, "true").code == 0


def test_a_home_may_lie_deep(tmp_path, cache, workspace):
    """The name of a socket has 108 bytes at most; the path of a home has not."""
    from luminaguard.testing import Home

    deep = Home(tmp_path / ("d" * 60) / ("e" * 60) / "home", cache)
    with deep.serving():
        assert deep.exec(workspace, "true").code == 0
        assert pool_status(deep)["status"]["hits"] == 1


def test_a_borrower_that_is_killed_ends_its_machine(home, workspace):
    with home.serving():
        argv = home.argv("exec", "-w", str(workspace), "--", "sh", "-c", "echo ready; sleep 600")
        with subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as borrower:
            assert borrower.stdout.readline() == b"ready\n"
            lent = [vm for vm in home.run("vm", "list", "--json").json["vms"] if vm["state"] == "running"]
            assert len(lent) == 1
            borrower.kill()
            borrower.wait()
        deadline = time.monotonic() + 5
        while alive(lent[0]["pid"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(lent[0]["pid"])


def test_a_lender_that_is_stopped_is_not_waited_for(home, workspace):
    with home.serving() as lender:
        os.kill(lender.pid, signal.SIGSTOP)
        try:
            assert home.exec(workspace, "cat", "a.txt", timeout_s=60).json["stdout"] == "one\ntwo\n"
            assert home.run("pool", "status", "--json").json == {"running": False}
        finally:
            os.kill(lender.pid, signal.SIGCONT)
        assert home.exec(workspace, "true").code == 0


def test_a_lender_that_is_killed_is_an_error_for_the_borrower(home, workspace):
    with home.serving() as lender:
        argv = home.argv("exec", "-w", str(workspace), "--json", "--", "sh", "-c", "sleep 600")
        with subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as borrower:
            while not [vm for vm in home.run("vm", "list", "--json").json["vms"] if vm["state"] == "running"]:
                time.sleep(0.05)
            lender.kill()
            said = json.loads(borrower.stdout.read())
            assert borrower.wait(30) == 125
    assert said["error"]["type"] == "MachineError"
    deadline = time.monotonic() + 30
    while (home.folder / "run" / "pool.sock").exists():  # swept up with the machines
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert home.exec(workspace, "true").code == 0


@pytest.mark.slow
def test_killing_the_owner_of_many_machines_leaves_none(home):
    count = "20"
    variables = {"LUMINAGUARD_POOL_MINIMUM": count, "LUMINAGUARD_POOL_MAXIMUM": count}
    with home.serving(**variables) as lender:
        deadline = time.monotonic() + 60
        while pool_status(home)["status"]["ready"] < int(count):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        vms = home.run("vm", "list", "--json").json["vms"]
        assert len(vms) == int(count)
        names, run_folder = {vm["id"] for vm in vms}, home.folder / "run"
        lender.kill()

        def left() -> list[object]:
            found: list[object] = [vm["id"] for vm in vms if alive(vm["pid"])]
            found += names & set(CgroupStore().groups())
            return [*found, *(run_folder / "vms").iterdir(), *run_folder.glob("owner-*")]

        # Nobody runs another command: what was left behind goes by itself.
        deadline = time.monotonic() + GONE_S
        while left() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert left() == []
    ended = [vm for vm in home.run("vm", "list", "--all", "--json").json["vms"] if vm["id"] in names]
    assert {vm["reason"] for vm in ended} == {"its owner died"}
    assert home.run("vm", "reap", "--json").json["vms"] == []


# -- records -------------------------------------------------------------------------------------------


def test_metrics_are_what_prometheus_reads(home, workspace):
    from prometheus_client.parser import text_string_to_metric_families

    with home.serving():
        home.exec(workspace, "true")
        families = {f.name: f for f in text_string_to_metric_families(home.run("metrics").out)}
    assert families["luminaguard_pool_hits"].samples[0].value == 1
    assert families["luminaguard_pool_wait_seconds"].samples[0].value > 0
    assert {sample.labels["kind"] for sample in families["luminaguard_vm_memory_bytes"].samples} == {
        "rss",
        "pss",
        "private",
    }
    assert sum(sample.value for sample in families["luminaguard_vm_count"].samples) >= 1
    assert str(workspace) not in home.run("metrics").out
    assert "luminaguard_pool" not in home.run("metrics").out  # there is none any more


def test_machines_are_shown_killed_and_remembered(home, workspace):
    argv = home.argv("exec", "-w", str(workspace), "--json", "--", "sh", "-c", "sleep 600")
    with subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        vms: list[dict] = []
        while not vms or vms[0]["state"] != "running":
            vms = home.run("vm", "list", "--json").json["vms"]
        (vm,) = vms
        shown = home.run("vm", "show", vm["id"], "--json").json
        assert shown["jail"]["namespaces"] == "on"
        assert shown["cpu_s"] > 0
        assert shown["rss_bytes"] > shown["private_bytes"] > 1 << 20
        assert shown["task"] == ["sh", "-c", "sleep 600"]
        assert home.run("vm", "kill", vm["id"]).code == 0
        said = json.loads(process.stdout.read())
        assert process.wait(30) == 125
    assert said["status"] == "refused"
    assert said["error"]["hint"] == "It was ended by 'luminaguard vm kill'."
    gone = home.run("vm", "show", vm["id"], "--json").json
    assert (gone["state"], gone["reason"], gone["exit_status"]) == ("gone", "luminaguard vm kill", 137)
    assert vm["id"] in home.run("vm", "list", "--all").out
    assert home.run("vm", "kill", vm["id"]).code == 122
    assert home.run("vm", "show", str(uuid.uuid4())).code == 122


def test_a_process_that_took_over_the_number_is_not_killed(home):
    """The record's start time has to be the process's own."""
    with subprocess.Popen(["sleep", "60"]) as bystander:
        folder = home.folder / "run" / "vms"
        folder.mkdir(parents=True, mode=0o700)
        record = {"id": "vm-0000000000", "backend": "qemu", "accelerator": "tcg", "state": "running",
                  "pid": bystander.pid, "started": start_time(bystander.pid) - 1, "owner": 1, "workspace": "/w",
                  "task": ["x"], "created_ns": 1}  # fmt: skip
        (folder / "vm-0000000000.json").write_text(json.dumps(record))
        (folder / "vm-damaged.json").write_text("{")
        assert home.run("vm", "list", "--json").json == {"vms": []}
        assert bystander.poll() is None
        bystander.kill()
    assert list(folder.iterdir()) == []


def test_two_processes_build_one_template(home, cache, tmp_path, workspace):
    """Both find none; one builds, the other waits for it."""
    from luminaguard.testing import Home

    own = tmp_path / "own-cache"
    own.mkdir()
    (own / "images").symlink_to(cache / "images")
    shared = Home(tmp_path / "shared", own)
    argv = shared.argv("exec", "-w", str(workspace), "--", "cat", "a.txt")
    pipes = {"stdout": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    both = [subprocess.Popen(argv, env=shared.environment, **pipes) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=150)[0] == b"one\ntwo\n"
        assert process.returncode == 0
    assert len([entry for entry in (own / "templates").iterdir() if entry.is_dir()]) == 1
    assert Path(own / "templates").exists()


def test_watching_prints_again_until_interrupted(home):
    argv = home.argv("vm", "list", "--watch", "--json")
    with subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE) as process:
        assert [json.loads(process.stdout.readline()) for _ in range(2)] == [{"vms": []}] * 2
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_a_long_command_does_not_hide_its_machine(tmp_path):
    tracker = VMTracker(tmp_path)
    hypervisor = SimpleNamespace(name="qemu", accelerator="tcg")
    process = SimpleNamespace(pid=os.getpid(), layers={}, groups=[], running=True)
    tracked = tracker.track("vm-0", hypervisor, workspace="é" * 4000, task=["é" * 500] * 100)
    with tracked.follow(process):
        tracked.update(state="running")
        (record,) = tracker.running()
        assert (record.id, record.state) == ("vm-0", "running")
        assert record.task[0].startswith("é")
    assert tracker.running() == []


def test_a_machine_that_is_killed_while_it_is_fed_is_one_typed_error(home, workspace, tmp_path):
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(64 << 20)
    argv = home.argv("exec", "-w", str(workspace), "--json", "--", "sleep", "600")
    with big.open("rb") as stdin, subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE,
                                                    stderr=subprocess.PIPE, stdin=stdin) as process:  # fmt: skip
        while not [vm for vm in home.run("vm", "list", "--json").json["vms"] if vm["state"] == "running"]:
            assert process.poll() is None
        (vm,) = home.run("vm", "list", "--json").json["vms"]
        home.run("vm", "kill", vm["id"])
        said = json.loads(process.stdout.read())
        assert process.stderr.read() == b""
        assert process.wait(30) == 125
    assert said["error"]["type"] == "MachineError"


def test_an_owner_killed_at_any_moment_leaves_no_hypervisor(home, workspace):
    """Not the records are asked but the kernel; a process that waits at its gate counts as well."""
    before = {path.name for path in Path("/proc").glob("[0-9]*")}
    for number in range(14):
        argv = home.argv("exec", "-w", str(workspace), "--", "sleep", "600")
        with subprocess.Popen(argv, env=home.environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as owner:
            time.sleep(0.25 + number * 0.03)
            owner.kill()
    assert home.run("vm", "reap").code == 0
    deadline = time.monotonic() + 5
    while (left := left_behind(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def left_behind(before: set[str]) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        if path.name in before:
            continue
        try:
            parent = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            name = (path / "comm").read_text().strip()
        except OSError:
            continue
        if parent == "1" and name in {"bwrap", "qemu-system-x86", "setpriv"}:
            found.append(f"{path.name} {name}")
    return found


@pytest.mark.parametrize("how", ["cancelled", "failed", "done"])
def test_whoever_gives_a_borrowed_machine_back_finds_it_gone(runtime, disk, how):
    """However it was given back: the slot that it had is another's from then on."""

    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(1, 1)) as pool, anyio.create_task_group() as tasks:
            await tasks.start(_lend, Lender(pool, runtime.folders.run, runtime.kind))
            for _ in range(3):
                await pool.wait_ready(1)
                pid = 0
                with anyio.CancelScope() as scope, suppress(KeyError):
                    async with borrow(runtime.folders.run, [disk], runtime.kind, folder="/f", task=["t"]) as vm:
                        assert vm is not None
                        pid = vm.process.pid
                        assert alive(pid)
                        if how == "failed":
                            raise KeyError
                        if how == "cancelled":
                            scope.cancel()
                            await anyio.sleep_forever()
                assert pid and not alive(pid)
            tasks.cancel_scope.cancel()

    run(scenario)


async def _lend(lender, *, task_status):
    await lender.serve(on_ready=task_status.started)
