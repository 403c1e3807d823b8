"""The hypervisor port: one suite, run against every backend.

``qemu`` is the real one; ``stand-in`` is Firecracker's test double, which shows that the backend keeps
to the rules of the API; ``firecracker`` is the real one and needs KVM (``make firecracker-lab``).
"""

import os
import shutil
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from luminaguard.errors import ImageTampered, JailUnavailable, MachineError
from luminaguard.images.build import ImageStore
from luminaguard.images.manifest import ROOT
from luminaguard.microvm import machine as machines
from luminaguard.microvm.channel import open_channel
from luminaguard.microvm.firecracker.backend import FirecrackerHypervisor
from luminaguard.microvm.firecracker.probe import find_firecracker
from luminaguard.microvm.jail import CgroupStore, Jail, JailFolders, not_followed
from luminaguard.microvm.machine import MicroVM, all_disks, clone, new_id, watch
from luminaguard.microvm.pool import Pool, PoolLimits, Template
from luminaguard.microvm.port import Hypervisor
from luminaguard.microvm.select import choose_hypervisor
from luminaguard.microvm.template import TemplateStore, placeholder
from luminaguard.microvm.tracker import VMTracker
from luminaguard.settings import Settings
from luminaguard.testing import firecracker as standin
from luminaguard.testing.machines import alive, output_of, until
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.state import Limits, read_state

pytestmark = pytest.mark.vm
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="Firecracker's jailer needs root")
BACKENDS = ["qemu", pytest.param("stand-in", marks=needs_root),
            pytest.param("firecracker", marks=pytest.mark.firecracker)]  # fmt: skip


SECRET = b"s" * 32


class Port:
    """A backend with its template, on folders of its own."""

    def __init__(self, hypervisor: Hypervisor, cache: Path, image, run_folder: Path) -> None:
        self.hypervisor = hypervisor
        self.tracker = VMTracker(run_folder)
        self.store = TemplateStore(cache, SECRET, self.tracker)
        self.image = image
        self.run_folder = run_folder
        self.images = WorkspaceImages(run_folder)
        self.real = True

    @asynccontextmanager
    async def template(self):
        root = self.image.open_part(ROOT)
        rehearsal = placeholder(os.pread(self.disk("rehearsal"), 1 << 20, 0))
        async with self.store.saved(self.hypervisor, self.image, 256, lambda _: None) as saved:
            yield Template("v1", saved, root, rehearsal)
        os.close(root)
        os.close(rehearsal)

    def disk(self, word: str) -> int:
        """A workspace with one file that says ``marker <word>``."""
        folder = self.run_folder / f"workspace-{word}"
        folder.mkdir(exist_ok=True)
        (folder / "marker").write_text(f"marker {word}\n")
        return self.images.open(read_state(folder, Limits(100, 1 << 20)))

    @asynccontextmanager
    async def clone(self, template: Template, word: str = "one"):
        disk = self.disk(word)
        async with clone(self.hypervisor, template.saved, (template.root, disk), self.tracker) as vm:
            os.close(disk)
            yield vm

    def left_behind(self) -> list[str]:
        names = {path.stem for path in (self.run_folder / "vms").glob("*")}
        names |= set(JailFolders(self.run_folder).machines())
        return sorted(names)


@pytest.fixture(scope="module", params=BACKENDS)
def port(request, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("port")
    run_folder = folder / "run"
    run_folder.mkdir()
    if request.param == "qemu":
        hypervisor: Hypervisor = choose_hypervisor(Settings(backend="qemu"), run_folder, Jail())
        templates = folder
    else:
        programs = (
            os.environ.get("LUMINAGUARD_FIRECRACKER", "firecracker"),
            os.environ.get("LUMINAGUARD_JAILER", "jailer"),
        )
        if request.param == "stand-in":
            programs = tuple(map(str, standin.install(folder)))
        hypervisor = FirecrackerHypervisor(find_firecracker(*programs), Jail(), JailFolders(run_folder))
        templates = folder
    found = Port(hypervisor, templates, ImageStore(cache).current(), run_folder)
    found.real = request.param != "stand-in"
    yield found
    hypervisor.close()
    shutil.rmtree(folder)  # hundreds of megabytes, which may lie in memory


def run(function, *arguments):
    async def bounded():
        with anyio.fail_after(600):
            await function(*arguments)

    try:
        anyio.run(bounded)
    except MachineError as error:
        print("\n".join(getattr(error, "__notes__", [])))
        raise


def test_a_clone_runs_commands_shows_its_changes_and_leaves_nothing(port):
    async def scenario() -> None:
        async with port.template() as template, port.clone(template) as vm:
            pid = vm.process.pid
            assert await output_of(vm, "echo", "hello", "there") == "hello there\n"
            assert await output_of(vm, "cat", "marker") == "marker one\n"
            assert await output_of(vm, "cat", "/proc/sys/kernel/hostname") == f"{vm.id}\n"
            await output_of(vm, "touch", "/workspace/new")
            seen: list[str] = []
            await vm.changes(lambda entry: seen.append(entry.path), lambda _: None)
            assert seen == ["new"]
            assert set(vm.process.layers.values()) == {"on"} or os.geteuid() != 0
            assert vm.process.layers["seccomp"] == "on"
        assert not alive(pid)

    run(scenario)
    assert port.left_behind() == []


def test_a_workspace_with_a_layer_is_shown_as_it_is_now(port):
    """The third disk: what changed since the workspace was packed."""
    folder = port.run_folder / "workspace-layered"
    folder.mkdir()
    for number in range(1200):
        (folder / f"f{number}").touch()
    (folder / "marker").write_text("marker before\n")
    base, none = port.images.open_layered(read_state(folder, Limits(2000, 1 << 20)))
    assert none == -1
    (folder / "marker").write_text("marker after\n")
    (folder / "f7").unlink()
    same, layer = port.images.open_layered(read_state(folder, Limits(2000, 1 << 20)))
    assert layer >= 0

    async def scenario() -> None:
        async with port.template() as template:
            for disks, said in (((base,), "before"), ((same, layer), "after"), ((base,), "before")):
                async with clone(port.hypervisor, template.saved, (template.root, *disks), port.tracker) as vm:
                    assert await output_of(vm, "cat", "marker") == f"marker {said}\n"

    run(scenario)
    for fd in (base, same, layer):
        os.close(fd)
    assert port.left_behind() == []


def test_three_clones_of_one_template_share_nothing(port):
    async def scenario() -> None:
        drawn: list[str] = []
        async with port.template() as template:
            for number in range(3):
                async with port.clone(template) as vm:
                    drawn += [await output_of(vm, "cat", "/proc/sys/kernel/random/uuid"), vm.id, vm.boot_id]
                    for other in range(number):
                        await output_of(vm, "test", "-e", f"/tmp/{other}", status=1)
                    await output_of(vm, "touch", f"/tmp/{number}")
                    await output_of(vm, "test", "-e", f"/tmp/{number}")
        assert len(set(drawn)) == 9
        assert all(drawn)

    run(scenario)


def test_three_clones_live_side_by_side(port):
    async def scenario() -> None:
        async with (
            port.template() as template,
            port.clone(template) as a,
            port.clone(template, "two") as b,
            port.clone(template) as c,
        ):
            said = [await output_of(vm, "cat", "marker") for vm in (a, b, c)]
            assert said == ["marker one\n", "marker two\n", "marker one\n"]
            assert len({vm.process.pid for vm in (a, b, c)}) == 3

    run(scenario)


def test_a_clone_that_waits_takes_another_disk_and_then_runs(port):
    async def scenario() -> None:
        async with port.template() as template:
            disks = all_disks((template.root, template.rehearsal))
            async with port.hypervisor.clone(
                new_id(), template.saved, disks, follow=not_followed, running=False
            ) as machine:
                await machine.check()
                disk = port.disk("two")
                await machine.replace_disk(1, disk)
                os.close(disk)
                await machine.resume()
                async with open_channel(machine.channel) as channel:
                    vm = MicroVM("vm-0000000000", machine, channel, backend="", accelerator="")
                    await vm.wake()
                    assert await output_of(vm, "cat", "marker") == "marker two\n"

    run(scenario)


def test_a_machine_that_cannot_be_paused_says_so_and_one_that_can_goes_on(port):
    async def scenario() -> None:
        async with port.template() as template:
            disks = all_disks((template.root, template.rehearsal))
            async with port.hypervisor.clone(new_id(), template.saved, disks, follow=not_followed) as machine:
                if not port.hypervisor.capabilities.pause:
                    with pytest.raises(MachineError, match="loses its guest"):
                        await machine.pause()
                    return
                async with open_channel(machine.channel) as channel:
                    vm = MicroVM("vm-0000000000", machine, channel, backend="", accelerator="")
                    await vm.wake()
                    await machine.pause()
                    await anyio.sleep(0.1)
                    await machine.resume()
                    assert await output_of(vm, "echo", "on") == "on\n"

    run(scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_hypervisor_that_dies_or_hangs_is_found_out_and_removed(port, number, monkeypatch):
    monkeypatch.setattr(machines, "WATCH_S", 0.3)
    monkeypatch.setattr("luminaguard.microvm.qemu.qmp.ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr("luminaguard.microvm.firecracker.backend._CHECK_TIMEOUT_S", 1.0)

    async def scenario() -> None:
        async with port.template() as template, port.clone(template) as vm:
            pid = vm.process.pid

            async def kill() -> None:
                await anyio.sleep(0.2)
                os.kill(pid, number)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kill)
                with pytest.raises(MachineError):
                    await output_of(vm, "sleep", "600")
            await until(lambda: not alive(pid))

    run(scenario)
    assert port.left_behind() == []


@pytest.mark.parametrize("part", ["ram", "state", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_saved_machine_that_differs_from_what_was_saved_is_refused(port, part, how, tmp_path):
    async def build() -> None:
        async with port.template():
            pass

    run(build)
    shutil.copytree(port.store.folder, tmp_path / "templates", copy_function=os.link)
    copied = TemplateStore(tmp_path, SECRET, port.tracker)
    key = copied.key(port.hypervisor, port.image, 256)
    path = tmp_path / "templates" / key / part
    data = bytearray(path.read_bytes())
    if how == "truncate":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)

    async def use() -> None:
        async with copied.saved(port.hypervisor, port.image, 256, lambda _: None):
            pass

    with pytest.raises(ImageTampered):
        run(use)


def test_a_saved_machine_that_another_installation_signed_is_refused(port):
    async def build() -> None:
        async with port.template():
            pass

    run(build)
    other = TemplateStore(port.store.folder.parent, b"o" * 32, port.tracker)

    async def use() -> None:
        async with other.saved(port.hypervisor, port.image, 256, lambda _: None):
            pass

    with pytest.raises(ImageTampered, match="not signed by this installation"):
        run(use)


def test_a_pool_lends_clones_once_and_makes_more(port):
    @asynccontextmanager
    async def templates():
        async with port.template() as template:
            yield template

    async def scenario() -> None:
        limits = PoolLimits(1, 1)
        async with Pool.open(port.hypervisor, templates, lambda: "v1", port.tracker, limits) as pool:
            await pool.wait_ready(1)
            seen = set()
            for word in ("one", "two"):
                await pool.wait_ready(1)
                disk = port.disk(word)
                async with pool.machine(disk) as vm:
                    assert await output_of(vm, "cat", "marker") == f"marker {word}\n"
                    seen.add(vm.id)
                os.close(disk)
            assert len(seen) == 2
            assert (pool.status.hits, pool.status.misses) == (2, 0)
        assert port.tracker.running() == []

    run(scenario)
    assert port.left_behind() == []


def test_what_a_killed_owner_leaves_is_gone_and_reaped(port):
    """The owner is a process of its own; when it is killed there is nobody to clean up."""
    pids: list[int] = []
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)

        async def own() -> None:
            async with port.template() as template, port.clone(template) as a, port.clone(template) as b:
                os.write(writer, f"{a.process.pid} {b.process.pid}\n".encode())
                await anyio.sleep(600)

        try:
            anyio.run(own)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as lines:
        pids = [int(word) for word in lines.readline().split()]
    assert len(pids) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 2
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))
    # Nobody calls the sweep here: it waits for the owner's end.
    deadline = time.monotonic() + 10
    while (port.left_behind() or list(port.run_folder.glob("owner-*"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert port.left_behind() == []
    reasons = [record.reason for record in port.tracker.ended() if record.owner == child]
    assert reasons == ["its owner died"] * 2


def test_the_record_of_a_machine_knows_what_it_uses(port):
    async def scenario() -> None:
        async with port.template() as template, port.clone(template) as vm:
            (record,) = port.tracker.running()
            assert (record.id, record.pid, record.backend) == (vm.id, vm.process.pid, port.hypervisor.name)
            used = record.usage()
            assert used is not None
            assert used.rss >= used.private > 0

            async def killed() -> None:
                port.tracker.kill(vm.id)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(killed)
                await watch(vm._machine, vm.id)

    run(scenario)
    assert port.left_behind() == []


def test_a_live_firecracker_is_jailed(port):
    if port.hypervisor.name != "firecracker":
        pytest.skip("QEMU's jail has tests of its own: test_jail.py")

    async def scenario() -> None:
        async with port.template() as template, port.clone(template) as a, port.clone(template) as b:
            uids = set()
            for vm in (a, b):
                pid = vm.process.pid
                rows = dict(
                    line.split(":\t", 1)
                    for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                    if ":\t" in line
                )
                uids |= {rows["Uid"].split()[0], rows["Gid"].split()[0]}
                assert rows["NoNewPrivs"] == "1"
                assert rows["Seccomp"] == "2"
                assert {int(rows[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
                for kind in ("mnt", "pid", "net", "ipc", "uts"):
                    ours = os.stat(f"/proc/self/ns/{kind}").st_ino
                    if port.real or kind != "mnt":
                        assert os.stat(f"/proc/{pid}/ns/{kind}").st_ino != ours, kind
                interfaces = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
                assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
                limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
                assert next(line for line in limits if line.startswith("Max file size")).split()[3] == str(4 << 20)
                assert f"/{vm.id}\n" in Path(f"/proc/{pid}/cgroup").read_text() or CgroupStore().missing
                port.tracker.reap()  # another process's: it must leave what lives alone
                root = JailFolders(port.run_folder).machines()[vm.id] / "root"
                assert [path.stat().st_uid for path in (root, root / "run", root / "dev")] == [0, 0, 0]
                for path in root.iterdir():
                    info = path.lstat()
                    if path.name in {"ram", "state", "vda", "vdb"}:
                        assert (info.st_uid, info.st_mode & 0o022) == (0, 0), path
                if not CgroupStore().missing:
                    assert vm.id in CgroupStore().groups()
            assert len(uids) == 2
            assert all(int(uid) > 1_000_000_000 for uid in uids)

    run(scenario)


@needs_root
def test_a_build_without_filters_is_refused_unless_the_user_said_so(cache, tmp_path):
    programs = standin.install(tmp_path, filtered=False)
    found = find_firecracker(*map(str, programs))
    image = ImageStore(cache).current()

    async def attempt(required: bool) -> dict[str, str]:
        hypervisor = FirecrackerHypervisor(found, Jail(required=required), JailFolders(tmp_path / "run"))
        store = TemplateStore(tmp_path / str(required), SECRET, VMTracker(tmp_path / str(required)))
        root = image.open_part(ROOT)
        try:
            async with store.saved(hypervisor, image, 256, lambda _: None) as saved:
                disks = all_disks((root, placeholder(b"")))
                async with hypervisor.clone(new_id(), saved, disks, follow=not_followed) as machine:
                    return machine.process.layers
        finally:
            os.close(root)
            hypervisor.close()

    with pytest.raises(JailUnavailable, match="no filters"):
        anyio.run(attempt, True)
    assert "no filters" in anyio.run(attempt, False)["seccomp"]


@pytest.mark.firecracker
def test_the_main_job_on_firecracker(home, workspace):
    """The command line, from the folder to the published change, with the backend asked for by name."""
    result = home.exec(
        workspace, "sh", "-c", "cat a.txt; echo new > n; rm run.sh", flags=("--publish", "always"), timeout_s=400,
        LUMINAGUARD_BACKEND="firecracker",
    )  # fmt: skip
    assert result.code == 0, result
    value = result.json
    assert (value["vm"]["backend"], value["vm"]["accelerator"]) == ("firecracker", "kvm")
    assert set(value["vm"]["jail"].values()) == {"on"}
    assert value["stdout"] == "one\ntwo\n"
    assert (workspace / "n").read_text() == "new\n"
    assert not (workspace / "run.sh").exists()
    assert home.run("ledger", "verify").code == 0
    assert home.run("vm", "list", "--json").json == {"vms": []}
    assert not list((home.folder / "run" / "jails").glob("firecracker/*"))


@pytest.mark.parametrize("wish", [{"LUMINAGUARD_ACCELERATOR": "tcg"}, {"LUMINAGUARD_FIRECRACKER": "/none"}])
def test_firecracker_that_was_asked_for_is_never_replaced_by_something_else(home, workspace, wish):
    result = home.exec(workspace, "true", LUMINAGUARD_BACKEND="firecracker", **wish)
    assert result.code == 123
    assert result.json["error"]["type"] == "HypervisorUnavailable"
