"""``luminaguard approvals``: look at requests and decide them, from any process, also after a reboot."""

from __future__ import annotations

import sys
import time
from typing import Any

from luminaguard.cli import signals
from luminaguard.cli.execute import show_card
from luminaguard.cli.output import Progress, print_json, print_outcome, stop_writing, tell_recovered
from luminaguard.effects.text import visible
from luminaguard.runtime import Runtime

__all__ = ["approve", "close", "deny", "show_list", "show_one"]


def show_list(runtime: Runtime, *, everything: bool, as_json: bool) -> None:
    """Print the requests, oldest first."""
    tell_recovered(runtime.decisions.recover())
    found = runtime.approvals.list(everything=everything)
    if as_json:
        print_json({"requests": [_fields(request) for request in found]})
        return
    for request in found:
        age = max(0, int(time.time() - request.created_ns / 1e9))
        command = visible(" ".join(request.command))[:60]
        print(f"{request.id}  {request.state.value:9}  {_age(age):>6}  {visible(request.workspace)}  {command}")
    if not found:
        print("no requests" if everything else "nothing waits for a decision")


def show_one(runtime: Runtime, request_id: str, *, full: bool, as_json: bool) -> None:
    """Print one request with its card."""
    request = runtime.approvals.get(request_id)
    if as_json:
        changeset = runtime.approvals.changeset(request_id)
        print_json(_fields(request) | {"changeset": {"digest": changeset.digest, "changes": changeset.to_json()}})
        return
    sys.stderr.write(f"state: {request.state.value}\n")
    show_card(runtime, request, Progress(), full=full)


def approve(runtime: Runtime, request_id: str, *, as_json: bool) -> None:
    """Approve and publish."""
    tell_recovered(runtime.decisions.recover())
    request = runtime.approvals.get(request_id)
    with signals.held() as held:  # a publish that has begun ends, and is told
        with Progress(quiet=as_json).slowly("publishing") as step:
            runtime.decisions.approve_and_publish(request, means="command approvals approve", step=step)
        _tell(runtime, request_id, as_json, f"published {request_id} to {request.workspace}")
        number = held.take()
        signals.over()
    if number:
        sys.exit(128 + number)


def deny(runtime: Runtime, request_id: str, *, as_json: bool) -> None:
    """Deny; an approval that was not used is taken back."""
    request = runtime.approvals.get(request_id)
    runtime.decisions.deny(request, means="command approvals deny")
    _tell(runtime, request_id, as_json, f"denied {request_id}: nothing was published")


def close(runtime: Runtime, request_id: str, *, as_json: bool) -> None:
    """End a request whose outcome is unknown, after a person has looked at the folder."""
    kept = runtime.decisions.close_unknown(request_id)
    _tell(runtime, request_id, as_json, f"closed {request_id}; {kept}")


def _tell(runtime: Runtime, request_id: str, as_json: bool, text: str) -> None:
    if as_json:
        print_outcome(_fields(runtime.approvals.get(request_id)))
        return
    try:
        print(visible(text), flush=True)
    except BrokenPipeError:
        stop_writing()


def _fields(request: Any) -> dict[str, Any]:
    return {
        "id": request.id, "state": request.state.value, "workspace": request.workspace, "digest": request.digest,
        "command": list(request.command), "exit_code": request.exit_code, "created_ns": request.created_ns,
        "expires_ns": request.expires_ns,
    }  # fmt: skip


def _age(seconds: int) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
