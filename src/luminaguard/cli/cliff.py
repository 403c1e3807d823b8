"""The commands of the Approval Cliff: requests and their answers, grants, approvers, and the rules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from luminaguard.cli.common import Json, open_runtime

__all__ = ["approvals_app", "approvers_app", "grants_app", "policy_app"]


def _group(text: str) -> typer.Typer:
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)


approvals_app = _group("List, show and decide requests.")
grants_app = _group("Answers that hold for what comes again.")
approvers_app = _group("Who else may approve, for what two people must.")
policy_app = _group("The rules: check them, and see how they judge.")

RequestId = Annotated[str, typer.Argument(metavar="ID")]
Reason = Annotated[str, typer.Option("--reason", help="What the agent gets to read.")]
As = Annotated[str, typer.Option("--as", metavar="NAME", help="Answer as this approver; asks for their passphrase.")]
Workspace = Annotated[Path | None, typer.Option("--workspace", "-w", help="With the rules of this folder, too.")]
ActionFile = Annotated[Path, typer.Argument(metavar="FILE", help="JSON; - is standard input.")]


@approvals_app.command("list")
def approvals_list(
    everything: Annotated[bool, typer.Option("--all", help="Those that were decided, too.")] = False,
    as_json: Json = False,
) -> None:
    """List the requests that wait for a decision."""
    from luminaguard.cli import approvals

    approvals.show_list(open_runtime(as_json=as_json), everything=everything, as_json=as_json)


@approvals_app.command("show")
def approvals_show(
    request_id: RequestId,
    full: Annotated[bool, typer.Option("--full", help="Whole diffs.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Print it as a web page, with whole diffs.")] = False,
    as_json: Json = False,
) -> None:
    """Show the card of a request, and what was decided about it."""
    from luminaguard.cli import approvals

    approvals.show_one(open_runtime(as_json=as_json), request_id, full=full, as_json=as_json, as_page=html)


@approvals_app.command("approve")
def approvals_approve(
    request_id: RequestId,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="PATH", help="Publish this path alone; may be repeated.")
    ] = None,
    again: Annotated[
        int, typer.Option("--again", metavar="N", help="Grant the same for up to N more that come again.")
    ] = 0,
    during: Annotated[str, typer.Option("--for", help="How long that grant holds: 30min, 8h, 7d.")] = "8h",
    loosen: Annotated[
        list[str] | None,
        typer.Option("--loosen", metavar="NAME=PATTERN", help="Let the grant take a pattern for one of its values."),
    ] = None,
    person: As = "",
    as_json: Json = False,
) -> None:
    """Approve a request and publish its changes now."""
    from luminaguard.cli import approvals

    options = approvals.Approval(tuple(only) if only else None, again, during, tuple(loosen or ()), person)
    approvals.approve(open_runtime(as_json=as_json), request_id, options, as_json=as_json)


@approvals_app.command("deny")
def approvals_deny(request_id: RequestId, reason: Reason = "", person: As = "", as_json: Json = False) -> None:
    """Deny a request; its changes are discarded."""
    from luminaguard.cli import approvals

    approvals.answer(open_runtime(as_json=as_json), request_id, "deny", reason, person, as_json=as_json)


@approvals_app.command("return")
def approvals_return(request_id: RequestId, reason: Reason = "", person: As = "", as_json: Json = False) -> None:
    """Ask for changes: nothing is published, and the agent reads what should be different."""
    from luminaguard.cli import approvals

    approvals.answer(open_runtime(as_json=as_json), request_id, "ask for changes", reason, person, as_json=as_json)


@approvals_app.command("stop")
def approvals_stop(request_id: RequestId, reason: Reason = "", person: As = "", as_json: Json = False) -> None:
    """Deny a request and stop its task: its other requests end, and it runs nothing more."""
    from luminaguard.cli import approvals

    approvals.answer(open_runtime(as_json=as_json), request_id, "stop the task", reason, person, as_json=as_json)


@approvals_app.command("request")
def approvals_request(
    file: ActionFile,
    task: Annotated[str, typer.Option("--task", help="The task it belongs to.")] = "",
    taint: Annotated[
        list[str] | None, typer.Option("--taint", metavar="LABEL", help="It follows untrusted input of this label.")
    ] = None,
    wait: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="Wait for the decision.")] = 0,
    as_json: Json = False,
) -> None:
    """Ask for a call, a request or the use of a secret that you are about to make; exit 0 lets you, once.

    FILE holds {"effect": "call", "server": ..., "tool": ..., "arguments": {...}, "definition": {...}}, or
    {"effect": "request", "method": ..., "url": ..., "headers": [[name, value]], "body_size": ..., "body_sha256": ...,
    "preview": ...}, or {"effect": "secret", "name": ..., "purpose": ..., "host": ...}, or
    {"effect": "run", "tool": ..., "arguments": {...}, "workspace": ...}.
    """
    from luminaguard.cli import approvals

    sys.exit(
        approvals.request(open_runtime(as_json=as_json), file, task, frozenset(taint or ()), wait, as_json=as_json)
    )


@approvals_app.command("take")
def approvals_take(
    request_id: RequestId,
    wait: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="Wait for the decision.")] = 0,
    as_json: Json = False,
) -> None:
    """Take an answer that was given: exit 0 lets you do what you asked for, once."""
    from luminaguard.cli import approvals

    sys.exit(approvals.take(open_runtime(as_json=as_json), request_id, wait, as_json=as_json))


@approvals_app.command("close")
def approvals_close(request_id: RequestId, as_json: Json = False) -> None:
    """End a request whose outcome is unknown, after you have looked yourself."""
    from luminaguard.cli import approvals

    approvals.close(open_runtime(as_json=as_json), request_id, as_json=as_json)


@grants_app.command("list")
def grants_list(as_json: Json = False) -> None:
    """List the grants: what for, how long, how often used."""
    from luminaguard.cli import approvals

    approvals.show_grants(open_runtime(as_json=as_json), as_json=as_json)


@grants_app.command("revoke")
def grants_revoke(grant_id: RequestId, as_json: Json = False) -> None:
    """End a grant now."""
    from luminaguard.cli import approvals

    approvals.revoke_grant(open_runtime(as_json=as_json), grant_id, as_json=as_json)


@approvers_app.command("add")
def approvers_add(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Make a key for another person, who types a passphrase that they alone know."""
    from luminaguard.cli import approvals

    approvals.add_approver(open_runtime(as_json=as_json), name, as_json=as_json)


@approvers_app.command("list")
def approvers_list(as_json: Json = False) -> None:
    """List whose approvals count."""
    from luminaguard.cli import approvals

    approvals.show_approvers(open_runtime(as_json=as_json), as_json=as_json)


@approvers_app.command("remove")
def approvers_remove(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Let a person's approvals count no more."""
    from luminaguard.cli import approvals

    approvals.remove_approver(open_runtime(as_json=as_json), name, as_json=as_json)


@policy_app.command("check")
def policy_check(workspace: Workspace = None, as_json: Json = False) -> None:
    """Read all rules; say where one is wrong, or which hold in what order."""
    from luminaguard.cli import policy

    policy.check(open_runtime(as_json=as_json), workspace, as_json=as_json)


@policy_app.command("show")
def policy_show() -> None:
    """Print the built-in rules, as a file to copy from."""
    from luminaguard.cli import policy

    policy.show()


@policy_app.command("explain")
def policy_explain(file: ActionFile, workspace: Workspace = None, as_json: Json = False) -> None:
    """Judge an action: which rule decides, and why the ones before it did not match.

    FILE holds {"effect": "changeset", "workspace": ..., "arguments": {"command": [...]}, "files": [{"path": ...,
    "kind": "create", "marks": ["executable"], "bytes": 10}], "taint": ["web"]}, or an effect of "call", "request",
    "secret" or "run" with "server", "tool", "arguments", "annotations", "method", "url", "bytes", "secret".
    """
    from luminaguard.cli import policy

    sys.exit(policy.explain(open_runtime(as_json=as_json), file, workspace, as_json=as_json))


@policy_app.command("test")
def policy_test(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help='Lines of JSON: {"name", "action", "risk"}.')],
    workspace: Workspace = None,
    as_json: Json = False,
) -> None:
    """Judge a corpus of actions and compare with the risk that each should have."""
    from luminaguard.cli import policy

    sys.exit(policy.test(open_runtime(as_json=as_json), corpus, workspace, as_json=as_json))


@policy_app.command("suggest")
def policy_suggest(
    at_least: Annotated[int, typer.Option("--at-least", help="Approved so often, and never denied.")] = 3,
    as_json: Json = False,
) -> None:
    """Propose the narrowest rules for what you approved again and again; nothing is changed."""
    from luminaguard.cli import policy

    policy.suggest(open_runtime(as_json=as_json), at_least, as_json=as_json)
