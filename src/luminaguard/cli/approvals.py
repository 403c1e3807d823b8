"""``luminaguard approvals``, ``grants`` and ``approvers``: from any process, also after a reboot."""

from __future__ import annotations

import getpass
import json
import re
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luminaguard.approvals.model import Request, State, Verdict
from luminaguard.approvals.words import answered, duration, ended_words, request_json
from luminaguard.cli import signals
from luminaguard.cli.execute import card_lines, show_card
from luminaguard.cli.output import Progress, print_json, print_outcome, stop_writing, tell_recovered
from luminaguard.effects.changes import Changeset
from luminaguard.effects.text import visible, visible_name
from luminaguard.errors import EXIT_DENIED, EXIT_PENDING, EXIT_REFUSED, ActionInvalid, ApprovalError
from luminaguard.runtime import Runtime
from luminaguard.runtime.decisions import Again, Answer

__all__ = [
    "Approval",
    "add_approver",
    "answer",
    "approve",
    "close",
    "passphrase",
    "read_json",
    "remove_approver",
    "request",
    "revoke_grant",
    "show_approvers",
    "show_grants",
    "show_list",
    "show_one",
    "take",
]

_MAX_FILE = 8 << 20
_POLL_S = 0.2
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Approval:
    """The flags of an approval."""

    only: tuple[str, ...] | None = None
    again: int = 0
    during: str = "8h"
    loosen: tuple[str, ...] = ()
    person: str = ""


def show_list(runtime: Runtime, *, everything: bool, as_json: bool) -> None:
    """Print the requests, oldest first."""
    tell_recovered(runtime.decisions.recover())
    found = runtime.approvals.list(everything=everything)
    if as_json:
        print_json({"requests": [request_json(request) for request in found]})
        return
    now = time.time()
    for one in found:
        age, left = duration(now - one.created_ns / 1e9), duration(one.expires_ns / 1e9 - now)
        until = f"{left:>6} left" if one.state in {State.PENDING, State.APPROVED} else " " * 11
        command = visible(" ".join(one.command))[:60]
        where = visible(one.workspace) or one.effect
        print(f"{one.id}  {one.state.value:9}  {one.judged.severity.value:8}  {age:>6}  {until}  {where}  {command}")
    if not found:
        print("no requests" if everything else "nothing waits for a decision")


def show_one(runtime: Runtime, request_id: str, *, full: bool, as_json: bool, as_page: bool = False) -> None:
    """Print one request with its card, judged by the rules that hold now, and what was decided."""
    request = runtime.decisions.looked_at(runtime.approvals.get(request_id))
    if as_page:
        from luminaguard.effects.page import page

        print(page(f"{request.id}: {request.state.value}", card_lines(runtime, request, full=True)), end="")
        return
    decisions = runtime.approvals.decisions(request_id)
    if as_json:
        from luminaguard.effects.card import card_to_json

        effect = runtime.approvals.effect(request_id)
        told = request_json(request) | {
            "outcome": runtime.approvals.outcome(request_id), "card": card_to_json(runtime.decisions.card(request)),
            "decisions": [{"verdict": d.verdict.value, "person": d.person, "means": d.means, "reason": d.reason,
                           "part": d.part, "decided_ns": d.decided_ns} for d in decisions],
        }  # fmt: skip
        if isinstance(effect, Changeset):
            told["changeset"] = {"digest": effect.digest, "changes": effect.to_json()}
        print_json(told)
        return
    sys.stderr.write(f"state: {request.state.value}\n")
    for decision in decisions:
        part = f" of {', '.join(map(visible_name, decision.part))}" if decision.part is not None else ""
        reason = f": {visible(decision.reason)}" if decision.reason else ""
        sys.stderr.write(f"{decision.verdict.value}{part} by {visible(decision.person or decision.means)}{reason}\n")
    show_card(runtime, request, Progress(), full=full)


def approve(runtime: Runtime, request_id: str, options: Approval, *, as_json: bool) -> None:
    """Approve and publish."""
    if options.loosen and not options.again:
        raise ApprovalError("--loosen is for a grant, and there is none.", hint="Say how often: --again 5.")
    tell_recovered(runtime.decisions.recover())
    request = runtime.approvals.get(request_id)
    given = _answered_by(
        runtime, Answer(Verdict.APPROVE, "command approvals approve", part=options.only), options.person
    )
    again = Again(options.again, _seconds(options.during), _patterns(options.loosen)) if options.again else None
    with signals.held() as held:  # a publish that has begun ends, and is told
        if request.effect == "changeset":
            with Progress(quiet=as_json).slowly("publishing") as step:
                request = runtime.decisions.approve_and_publish(request, given, again=again, step=step)
            words = f"{runtime.approvals.outcome(request_id)}: {request_id} to {visible(request.workspace)}"
        else:
            request = runtime.decisions.approve_and_hand_over(request, given, again=again)
            words = f"approved {request_id}: whoever asked may do it once"
        if request.state is State.APPROVED and request.effect == "changeset":
            words = f"approved {request_id}: the worker of {request.home} publishes it"
        if request.state is State.PENDING:
            words = f"{request_id} needs the approval of another person, too"
        elif again is not None:
            grant = runtime.grants.list()[-1].grant
            scope = "\n".join(f"    {visible(line)}" for line in _scope_lines(grant.scope.to_json()))
            words += f"\n{grant.id} answers for up to {grant.limits.uses} more, during {options.during}:\n{scope}"
        _tell(runtime, request_id, as_json, words)
        number = held.take()
        signals.over()
    if number:
        sys.exit(128 + number)
    if request.state is State.PENDING:
        sys.exit(EXIT_PENDING)


def answer(runtime: Runtime, request_id: str, verdict: str, reason: str, person: str, *, as_json: bool) -> None:
    """Answer with anything but an approval."""
    request = runtime.approvals.get(request_id)
    given = _answered_by(runtime, Answer(Verdict(verdict), f"command approvals {verdict}", reason=reason), person)
    runtime.decisions.deny(request, given)
    _tell(runtime, request_id, as_json, f"{answered(given.verdict, reason)}; {request_id}: nothing was published")


def close(runtime: Runtime, request_id: str, *, as_json: bool) -> None:
    """End a request whose outcome is unknown, after a person has looked at the folder."""
    kept = runtime.decisions.close_unknown(request_id)
    _tell(runtime, request_id, as_json, f"closed {request_id}; {kept}")


# -- effects that somebody else carries out ---------------------------------------------------------------


def request(runtime: Runtime, file: Path, task: str, taint: frozenset[str], wait_s: float, *, as_json: bool) -> int:
    """Ask for an effect that the caller is about to make; return the exit status."""
    from luminaguard.effects.outside import outside_from_json

    raw = read_json(file)
    kind = raw.pop("effect", None) if isinstance(raw, dict) else None
    effect = outside_from_json(str(kind), raw)
    labels = runtime.tasks.add_labels(task, [(label, "given when it was asked") for label in taint]) if task else taint
    now = runtime.ledger.current_time()
    names = {"call": ("server", "tool"), "request": ("method", "url"), "secret": ("name", "purpose"),
             "run": ("tool", "workspace")}[effect.kind]  # fmt: skip
    asked = Request(
        id=f"req-{secrets.token_hex(6)}", workspace="", inode=0, digest=effect.digest,
        command=tuple(str(raw[name])[:500] for name in names), exit_code=0, created_ns=now,
        expires_ns=now + runtime.settings.approval_ttl_s * 1_000_000_000, state=State.PENDING, effect=effect.kind,  # type: ignore[arg-type]  # one of EffectKind
        task=task, taint=tuple(sorted(labels)),
    )  # fmt: skip
    asked = runtime.decisions.ask(asked, effect)
    if given := runtime.decisions.without_asking(asked):
        runtime.decisions.approve_and_hand_over(asked, given)
    return take(runtime, asked.id, wait_s, as_json=as_json)


def take(runtime: Runtime, request_id: str, wait_s: float, *, as_json: bool) -> int:
    """Wait for an answer and take it; return the exit status: 0 lets the caller do what it asked for, once."""
    deadline = time.monotonic() + wait_s
    while (asked := runtime.approvals.get(request_id)).state is State.PENDING and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if asked.effect == "changeset":
        raise ApprovalError(
            f"{request_id} is about files: LuminaGuard publishes them itself.", hint="Approve or deny it."
        )
    if asked.state is State.PENDING:
        _tell(runtime, request_id, as_json, f"pending: {request_id}\n  then: luminaguard approvals take {request_id}")
        return EXIT_PENDING
    if asked.state is State.APPROVED:
        runtime.decisions.hand_over(request_id)
        _tell(runtime, request_id, as_json, f"go ahead, once: {request_id}")
        return 0
    words = ended_words(asked.state, runtime.approvals.outcome(request_id))
    _tell(runtime, request_id, as_json, words)
    return EXIT_REFUSED if asked.state in {State.DONE, State.CLAIMED, State.UNKNOWN} else EXIT_DENIED


# -- grants and approvers -----------------------------------------------------------------------------------


def show_grants(runtime: Runtime, *, as_json: bool) -> None:
    """List the grants, oldest first."""
    now = runtime.ledger.current_time()
    rows: list[dict[str, Any]] = [
            {"id": s.grant.id, "state": s.state(now), "uses": s.uses, "of": s.grant.limits.uses,
             "expires_ns": s.grant.limits.expires_ns, "made_from": s.grant.made_from, "person": s.grant.person,
             "scope": s.grant.scope.to_json()} for s in runtime.grants.list()]  # fmt: skip
    if as_json:
        print_json({"grants": rows})
        return
    for row in rows:
        left = duration((row["expires_ns"] - now) / 1e9)
        print(f"{row['id']}  {row['state']:8}  used {row['uses']} of {row['of']}  {left} left  from {row['made_from']}")
        for line in _scope_lines(row["scope"]):
            print(f"    {visible(line)}")
    if not rows:
        print("no grants")


def _scope_lines(scope: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {value}" for name, value in (scope["values"] | scope["exact"]).items()]
    lines.append(f"at most {scope['severity']}; after {', '.join(scope['taint']) or 'no'} untrusted input")
    if scope["bytes"] is not None:
        lines.append(f"at most {scope['bytes']:,} bytes")
    return lines + [
        f"{kind} {path}" + (f" [{', '.join(marks)}]" if marks else "") for path, kind, marks, _ in scope["files"]
    ]


def revoke_grant(runtime: Runtime, grant_id: str, *, as_json: bool) -> None:
    """End a grant."""
    runtime.grants.revoke(grant_id)
    print_json({"id": grant_id, "state": "revoked"}) if as_json else print(f"revoked {grant_id}")


def add_approver(runtime: Runtime, name: str, *, as_json: bool) -> None:
    """Make another person's key."""
    from luminaguard.approvals.signing import key_id

    chosen = passphrase(f"Passphrase of {name}: ")
    if sys.stdin.isatty() and passphrase("Again: ") != chosen:
        raise ApprovalError("The two passphrases differ.", hint="Try again.")
    key = runtime.approvers.add(name, chosen)
    runtime.ledger.append("approver.added", name=name, key=key_id(key))
    print_json({"name": name, "key": key_id(key)}) if as_json else print(f"{name} may approve, with key {key_id(key)}")


def show_approvers(runtime: Runtime, *, as_json: bool) -> None:
    """List whose approvals count."""
    from luminaguard.approvals.signing import key_id

    people = {"owner": runtime.approvers.owner().public_key(), **runtime.approvers.people()}
    rows = [{"name": name, "key": key_id(key)} for name, key in people.items()]
    if as_json:
        print_json({"approvers": rows})
        return
    for row in rows:
        print(f"{row['name']:32}  {row['key']}")


def remove_approver(runtime: Runtime, name: str, *, as_json: bool) -> None:
    """Let a person's approvals count no more."""
    runtime.approvers.remove(name)
    runtime.ledger.append("approver.removed", name=name)
    print_json({"name": name, "state": "removed"}) if as_json else print(f"{name} may approve no more")


# -- helpers -----------------------------------------------------------------------------------------------


def read_json(file: Path) -> Any:
    """Read one JSON value from a file, or from standard input for ``-``.

    Raises:
        ActionInvalid: it cannot be read, is too large, or is no JSON.
    """
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(_MAX_FILE + 1)
        else:
            with file.open("rb") as opened:
                data = opened.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise ValueError(f"it is larger than {_MAX_FILE >> 20} MiB")
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ActionInvalid(f"{visible(str(file))} cannot be read: {error}.", hint="Give a file of JSON.") from error


def _answered_by(runtime: Runtime, given: Answer, person: str) -> Answer:
    """The answer as another person's, whose passphrase is asked for."""
    if not person:
        return given
    key = runtime.decisions.unlock(person, passphrase(f"Passphrase of {person}: "))
    return Answer(given.verdict, given.means, given.reason, given.part, person, key)


def passphrase(question: str) -> str:
    """A passphrase, from the terminal or a line of standard input."""
    if sys.stdin.isatty():
        return getpass.getpass(question)
    return sys.stdin.readline().rstrip("\n")


def _seconds(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6})(s|min|h|d)", text)
    if found is None:
        raise ApprovalError(f"{text!a} is not a span of time.", hint="Write 30min, 8h or 7d.")
    return int(found[1]) * _UNITS[found[2]]


def _patterns(words: tuple[str, ...]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    if bad := next((word for word, (_, sign, _) in zip(words, pairs, strict=True) if not sign), None):
        raise ApprovalError(f"{bad!a} is not NAME=PATTERN.", hint="For example: --loosen 'command=make *'")
    return {name: pattern for name, _, pattern in pairs}


def _tell(runtime: Runtime, request_id: str, as_json: bool, text: str) -> None:
    if as_json:
        told = {"reason": runtime.approvals.outcome(request_id)}
        print_outcome(request_json(runtime.approvals.get(request_id)) | told)
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        stop_writing()
