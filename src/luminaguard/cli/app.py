"""The command tree, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from luminaguard import log
from luminaguard.cli import agent, cliff, fleet, gateway, mcp, signals
from luminaguard.cli.common import Call, Json, open_runtime
from luminaguard.cli.paths import absolute
from luminaguard.errors import LuminaGuardError

__all__ = ["app", "run"]

app = typer.Typer(
    name="luminaguard",
    help="Run commands of AI agents in throwaway micro-VMs; publish only what you approved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    epilog="Exit codes: the command's own; 120 pending, 121 denied, 122 refused, 123 something is missing, "
    "124 timed out, 125 internal error, 126/127 command not executable/not found, 130 interrupted.",
)
ledger_app = typer.Typer(help="Verify and export the ledger.", no_args_is_help=True, rich_markup_mode=None)
image_app = typer.Typer(help="Build and verify guest images.", no_args_is_help=True, rich_markup_mode=None)
vm_app = typer.Typer(help="Running micro-VMs.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cliff.approvals_app, name="approvals")
app.add_typer(cliff.grants_app, name="grants")
app.add_typer(cliff.approvers_app, name="approvers")
app.add_typer(cliff.policy_app, name="policy")
app.add_typer(ledger_app, name="ledger")
app.add_typer(image_app, name="image")
pool_app = typer.Typer(help="A pool of machines that wait for work.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(vm_app, name="vm")
app.add_typer(pool_app, name="pool")
app.add_typer(agent.tasks_app, name="tasks")
app.add_typer(agent.models_app, name="models")
app.command("run")(agent.run)
app.add_typer(fleet.database_app, name="database")
app.add_typer(mcp.mcp_app, name="mcp")
app.add_typer(gateway.gateway_app, name="gateway")
app.command("worker")(fleet.worker)
app.command("hosts")(fleet.hosts)
app.command("serve")(fleet.serve)
app.add_typer(fleet.remote_app, name="remote")

Workspace = Annotated[Path, typer.Option("--workspace", "-w", help="The folder to work on.", readable=False)]
Publish = Annotated[str | None, typer.Option("--publish", help="ask, never or always.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds until the command is stopped.")]
Memory = Annotated[int | None, typer.Option("--memory", help="Memory of the machine in MiB.")]
Profile = Annotated[
    str | None, typer.Option("--profile", help="Which system calls it may make: strict, default or build.")
]
Watch = Annotated[bool, typer.Option("--watch", help="Again every second, until interrupted.")]
SHELL_TIMEOUT_S = 7 * 86400
VmId = Annotated[str, typer.Argument(metavar="ID")]
Task = Annotated[str, typer.Option("--task", help="The task it belongs to; labels of what it has read stay with it.")]
Taint = Annotated[
    list[str] | None, typer.Option("--taint", metavar="LABEL", help="It follows untrusted input of this label.")
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    del version  # answered before the command tree is loaded
    Call.debug = debug


@app.command("exec", context_settings={"allow_interspersed_args": False})
def exec_(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND [ARG]...")],
    workspace: Workspace = Path(),
    publish: Publish = None,
    timeout: Timeout = None,
    memory: Memory = None,
    profile: Profile = None,
    task: Task = "",
    taint: Taint = None,
    as_json: Json = False,
) -> None:
    """Run a command on a copy of the folder; show what it did; publish what you approve."""
    with signals.held() as held:
        from luminaguard.cli.execute import Options, execute

        runtime = open_runtime(as_json=as_json, publish=publish, timeout_s=timeout, memory_mib=memory, profile=profile)
        options = Options(publish=runtime.settings.publish, as_json=as_json, terminal=True, task=ascii(task)[1:-1],
                          taint=tuple(taint or ()))  # fmt: skip
        sys.exit(execute(runtime, absolute(workspace), command, options, held))


@app.command()
def shell(
    workspace: Workspace = Path(),
    publish: Publish = None,
    timeout: Timeout = None,
    memory: Memory = None,
    profile: Profile = None,
) -> None:
    """Open bash in a machine; at its end, show what changed and ask."""
    with signals.held() as held:
        from luminaguard.cli.execute import Options, execute

        # A person may think for longer than a command may run.
        runtime = open_runtime(publish=publish, timeout_s=timeout or SHELL_TIMEOUT_S, memory_mib=memory,
                               profile=profile)  # fmt: skip
        options = Options(publish=runtime.settings.publish, as_json=False, terminal=True)
        sys.exit(execute(runtime, absolute(workspace), ["bash"], options, held))


@ledger_app.command("verify")
def ledger_verify(as_json: Json = False) -> None:
    """Verify the hash chain, its signatures and its end."""
    from luminaguard.cli.output import print_json

    count = open_runtime(as_json=as_json).ledger.verify()
    if as_json:
        print_json({"status": "verified", "entries": count})
    else:
        print(f"the ledger verifies: {count} entries")


@ledger_app.command("resume")
def ledger_resume(reason: Annotated[str, typer.Option("--reason", help="What you found out.")]) -> None:
    """Go on after the ledger was cut off or exchanged; the break is recorded in it."""
    entry = open_runtime().ledger.resume(reason)
    print(f"the ledger goes on; entry {entry.seq} records the break")


@ledger_app.command("export")
def ledger_export() -> None:
    """Print every entry as a line of JSON, and the public key that signed the chain."""
    import json
    from dataclasses import asdict

    ledger = open_runtime().ledger
    print(json.dumps({"format": 1, "public_key": ledger.public_key.public_bytes_raw().hex()}))
    for entry in ledger.entries():
        try:
            body = json.loads(entry.body)
        except ValueError:
            body = {"damaged": entry.body}
        print(json.dumps(asdict(entry) | {"body": body}))


@image_app.command("build")
def image_build(
    kernel: Annotated[
        str | None,
        typer.Option("--kernel", help="distribution, or hardened: a small one that is built here (10 minutes)."),
    ] = None,
    from_oci: Annotated[
        Path | None,
        typer.Option(
            "--from-oci", metavar="PATH", help="Of a container image: an OCI layout, or a tar of docker save."
        ),
    ] = None,
    locked: Annotated[bool, typer.Option("--locked", help="Use nothing but the shipped package lock.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Build even if the image is up to date.")] = False,
    as_json: Json = False,
) -> None:
    """Build the guest image for this machine's distribution, without root."""
    from luminaguard.cli.output import Progress, print_json

    progress = Progress(quiet=as_json)
    try:
        runtime = open_runtime(as_json=as_json, kernel=kernel)
        image = runtime.images.build(progress, kernel=runtime.settings.kernel, container=from_oci, locked=locked,
                                     force=force)  # fmt: skip
    finally:
        progress.clear()
    if as_json:
        print_json({"status": "built", "id": image.folder.name, "locked": image.manifest.locked})
    else:
        note = "" if image.manifest.locked else " (not the packages of a shipped lock: apt chose them)"
        print(f"guest image {image.id}: {image.manifest.distribution}, kernel {image.manifest.kernel_release}{note}")


@image_app.command("list")
def image_list(as_json: Json = False) -> None:
    """List the guest images."""
    from luminaguard.cli.output import print_json

    store = open_runtime(as_json=as_json).images
    images, damaged = store.images(), store.damaged()
    current = store.current_name()
    rows: list[dict[str, Any]] = [
            {"id": i.folder.name, "current": i.folder.name == current, "distribution": i.manifest.distribution,
             "kernel": i.manifest.kernel_release, "kernel_kind": i.manifest.kernel,
             "container": i.manifest.container or None, "locked": i.manifest.locked,
             "bytes": sum(p.size for p in i.manifest.parts.values())} for i in images]  # fmt: skip
    if as_json:
        print_json({"images": rows, "damaged": damaged})
        return
    for row in rows:
        of = f"container {str(row['container'])[7:19]}" if row["container"] else row["distribution"]
        now = "  (used now)" if row["current"] else ""
        what = f"{of}  {row['kernel_kind']} kernel {row['kernel']}"
        print(f"{str(row['id'])[:12]}  {what}  {int(row['bytes']) >> 20} MiB{now}")
    for name in damaged:
        print(f"{name[:12]}  DAMAGED, or built by another version: its manifest is not one that can be used")


@image_app.command("use")
def image_use(image_id: Annotated[str, typer.Argument(metavar="ID")], as_json: Json = False) -> None:
    """Let new machines use an image that was built before; its id, or how it begins."""
    from luminaguard.cli.output import print_json

    image = open_runtime(as_json=as_json).images.use(image_id)
    if as_json:
        print_json({"status": "current", "id": image.folder.name})
    else:
        print(f"guest image {image.id} is used from here on")


@image_app.command("verify")
def image_verify(as_json: Json = False) -> None:
    """Verify every part of the current image against its manifest."""
    from luminaguard.cli.output import print_json

    image = open_runtime(as_json=as_json).images.current()
    image.verify()
    if as_json:
        print_json({"status": "verified", "id": image.folder.name})
    else:
        print(f"guest image {image.id} verifies: {len(image.manifest.parts)} parts")


@image_app.command("audit")
def image_audit(
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build it again from its packages and compare; about 10 s.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Make the attempts of the escape suite in machines of the image.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Inspect the built image: what may not be in it, how its programs were hardened, its bill of materials."""
    from luminaguard.cli.audit import audit

    raise typer.Exit(audit(open_runtime(as_json=as_json), rebuild=rebuild, live=live, as_json=as_json))


@image_app.command("lock")
def image_lock() -> None:
    """Resolve the guest's packages from this machine's apt sources and print the lock."""
    from luminaguard.images.lock import resolve

    print(resolve().dumps(), end="")


@vm_app.command("list")
def vm_list(
    everything: Annotated[bool, typer.Option("--all", help="Those that ended, too.")] = False,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """List the machines that run now; end those whose owner is gone."""
    from luminaguard.cli import machines

    runtime = open_runtime(as_json=as_json)

    def draw() -> None:
        machines.show_list(runtime, everything=everything, as_json=as_json)

    machines.watch(draw, as_json=as_json) if watch else draw()


@vm_app.command("show")
def vm_show(vm_id: VmId, as_json: Json = False) -> None:
    """Show all that is known of a machine: its jail, what it uses, how it ended."""
    from luminaguard.cli import machines

    machines.show(open_runtime(as_json=as_json), vm_id, as_json=as_json)


@vm_app.command("kill")
def vm_kill(vm_id: VmId, as_json: Json = False) -> None:
    """End a machine; nothing of it is published."""
    from luminaguard.cli import machines

    machines.kill(open_runtime(as_json=as_json), vm_id, as_json=as_json)


@vm_app.command("reap")
def vm_reap(as_json: Json = False) -> None:
    """End the machines, and remove the cgroups, that killed processes left."""
    from luminaguard.cli import machines

    machines.reap(open_runtime(as_json=as_json), as_json=as_json)


@pool_app.command("serve")
def pool_serve() -> None:
    """Keep machines ready and lend them to every exec of this user, until interrupted."""
    from luminaguard.cli import machines

    machines.serve_pool(open_runtime())


@pool_app.command("status")
def pool_status(watch: Watch = False, as_json: Json = False) -> None:
    """Show how many machines wait, hits and misses."""
    from luminaguard.cli import machines

    runtime = open_runtime(as_json=as_json)

    def draw() -> None:
        machines.pool_status(runtime, as_json=as_json)

    machines.watch(draw, as_json=as_json) if watch else draw()


@app.command()
def approve(as_json: Annotated[bool, typer.Option("--json", hidden=True)] = False) -> None:
    """Open the inbox of requests that wait: look at them, and decide, in full screen."""
    from luminaguard.cli.inbox import open_inbox

    open_inbox(open_runtime(as_json=as_json))


@app.command()
def metrics() -> None:
    """Print machines and the pool in the text format of Prometheus."""
    from luminaguard.cli import machines

    machines.metrics(open_runtime())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check everything that LuminaGuard needs on this machine, by trying it."""
    from luminaguard.cli import doctor as checks

    Call.as_json = as_json
    sys.exit(checks.run(as_json=as_json))


@app.command()
def recover() -> None:
    """Finish or undo what an interrupted publish left (every exec does this too)."""
    from luminaguard.effects.text import visible

    told = open_runtime().decisions.recover()
    print("\n".join(map(visible, told)) or "nothing was interrupted")


def run() -> None:
    """Run the command line; the only place that turns errors into exit codes."""
    from luminaguard.cli.output import open_streams, print_error, stop_writing

    open_streams()
    if sys.argv[1:2] not in (["exec"], ["shell"]):  # bytes that are no text mean nothing to any other command
        sys.argv[1:] = [word.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                        for word in sys.argv[1:]]  # fmt: skip
    try:
        with Call.closing:
            app()
    except LuminaGuardError as error:
        if Call.debug:
            raise
        print_error(error, as_json=Call.as_json)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        stop_writing()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:  # whatever it is, people get a sentence and not a traceback
        if Call.debug:
            raise
        log.event("internal_error", error=repr(error), where=_where(error))
        unforeseen = LuminaGuardError(
            f"Something went wrong that LuminaGuard did not foresee: {type(error).__name__}: {error}",
            hint="Run the command again as 'luminaguard --debug ...' to see where, and report it.",
            kept="Every publish is all or nothing; 'luminaguard recover' ends one that was interrupted.",
        )
        print_error(unforeseen, as_json=Call.as_json)
        sys.exit(unforeseen.exit_code)


def _where(error: BaseException) -> str:
    """The innermost place of a traceback, for the log."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
