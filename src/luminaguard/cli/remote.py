"""``luminaguard remote``: look at requests and answer them through a service, with a key of one's own.

Nothing that the service says is believed where it matters: the digest that is signed is computed here, from the
changes that are shown here, and every content is compared with its SHA-256.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import secrets
import ssl
import sys
import time
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luminaguard.approvals import Decision, Request, State, Verdict, sign
from luminaguard.approvals.signing import sign_ticket
from luminaguard.approvals.words import answered, duration, heading
from luminaguard.cli.output import print_json, print_lines
from luminaguard.effects.card import MAX_TEXT, make_card
from luminaguard.effects.changes import Changeset, FileEntry
from luminaguard.effects.outside import Outside, outside_from_json
from luminaguard.effects.outside_card import make_outside_card
from luminaguard.effects.render import render
from luminaguard.effects.text import visible
from luminaguard.errors import (
    ActionInvalid,
    ApprovalError,
    ChangesetRefused,
    LuminaGuardError,
    SettingsError,
    Unavailable,
)
from luminaguard.service.wire import decision_from_json, decision_to_json, request_from_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["Service", "answer", "show_list", "show_one"]

_MOST_ANSWER = 256 << 20
_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request as the service tells it, checked."""

    request: Request
    effect: Changeset | Outside
    outcome: str
    decisions: tuple[Decision, ...]
    now_ns: int


class Service:
    """A service, as one approver sees it.

    Args:
        url: ``https://HOST:PORT``; ``http`` for this machine alone.
        authority: a PEM file with the authority that signed its certificate; the system's if empty.
        name, key: the approver's.

    Raises:
        SettingsError: the URL or the file cannot be used.
    """

    def __init__(self, url: str, authority: str, name: str, key: Ed25519PrivateKey) -> None:
        self._split = urllib.parse.urlsplit(url)
        local = self._split.hostname in {"127.0.0.1", "::1", "localhost"}
        if self._split.scheme not in {"https", "http"} or not self._split.hostname:
            raise SettingsError(f"{url!a} is no URL of a service.", hint="For example https://fleet.example:8443.")
        if self._split.scheme == "http" and not local:
            raise SettingsError("A service on another machine is asked by https only.", hint="Write https://...")
        try:
            self._context = ssl.create_default_context(cafile=authority or None)
        except OSError as error:
            raise SettingsError(
                f"The authority {authority} cannot be read: {error}.", hint="It is a PEM file."
            ) from error
        self.name, self.key = name, key

    def ask(self, target: str, body: bytes | None = None) -> bytes:
        """What the service answers.

        Raises:
            Unavailable: it cannot be reached.
            ApprovalError: it refuses.
        """
        method = "GET" if body is None else "POST"
        headers = {"Authorization": sign_ticket(method, target, time.time_ns(), self.key)}
        connection = self._connection()
        try:
            connection.request(method, target, body=body, headers=headers)
            response = connection.getresponse()
            data = response.read(_MOST_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(
                f"The service {self._split.netloc} cannot be reached: {error}.",
                hint="Check its address, that 'luminaguard serve' runs there, and the authority of its certificate "
                "(--authority).",
            ) from error
        finally:
            connection.close()
        if response.status != 200:
            raise self._refusal(response.status, data)
        return data

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._split.hostname or "", self._split.port
        if self._split.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=self._context)

    def _refusal(self, status: int, data: bytes) -> LuminaGuardError:
        try:
            told = json.loads(data)["error"]
            message, hint = visible(str(told["message"]))[:1000], visible(str(told["hint"]))[:1000]
            kept = visible(str(told.get("kept", "")))[:1000]
        except (ValueError, KeyError, TypeError, RecursionError):
            message, hint, kept = f"it answered with status {status}", "", ""
        return ApprovalError(f"The service refuses: {message}", hint=hint or "Ask who runs the service.", kept=kept)

    def json(self, target: str, body: bytes | None = None) -> Any:
        """:meth:`ask` for JSON."""
        try:
            return json.loads(self.ask(target, body))
        except (ValueError, RecursionError) as error:
            raise ApprovalError("The service's answer is no JSON.", hint="Ask who runs the service.") from error

    def request(self, request_id: str) -> _Asked:
        """One request, whose digest is that of its effect."""
        raw = self.json(f"/v1/requests/{urllib.parse.quote(request_id, safe='')}")
        try:
            request = request_from_json(raw["request"])
            kind, shown = request.effect, raw["effect"]
            effect = Changeset.from_json(shown) if kind == "changeset" else outside_from_json(kind, shown)
            decisions = tuple(map(decision_from_json, raw["decisions"]))
            found = _Asked(request, effect, str(raw["outcome"]), decisions, int(raw["now_ns"]))
        except (KeyError, TypeError, ValueError, ChangesetRefused, ActionInvalid, RecursionError) as error:
            raise ApprovalError(
                f"The service's answer cannot be read ({error}).", hint="Ask who runs the service."
            ) from error
        if request.id != request_id or effect.digest != request.digest:
            raise ApprovalError(
                "What the service shows is not what it asks approval for.", hint="Do not approve it; tell who runs it."
            )
        return found

    def content(self, request_id: str, sha256: str) -> bytes | None:
        """A content; None if it is not kept, or is not what its SHA-256 says."""
        try:
            data = self.ask(f"/v1/requests/{urllib.parse.quote(request_id, safe='')}/contents/{sha256}")
        except ApprovalError:
            return None
        return data if len(data) <= MAX_TEXT and hashlib.sha256(data).hexdigest() == sha256 else None


def show_list(service: Service, *, everything: bool, as_json: bool) -> None:
    """Print the requests, oldest first."""
    raw = service.json("/v1/requests" + ("?all=1" if everything else ""))
    if as_json:
        print_json(raw)
        return
    try:
        rows = [(str(one["id"]), str(one["state"]), str(one["judged"]["severity"]), str(one["workspace"]),
                 " ".join(map(str, one["command"]))) for one in raw["requests"]]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ApprovalError("The service's answer is no list.", hint="Ask who runs the service.") from error
    for request_id, state, severity, workspace, command in rows:
        print(f"{visible(request_id)}  {visible(state):9}  {visible(severity):8}  {visible(workspace)}  "
              f"{visible(command)[:60]}")  # fmt: skip
    if not rows:
        print("no requests" if everything else "nothing waits for a decision")


def show_one(service: Service, request_id: str, *, full: bool) -> None:
    """Print one request with its card."""
    _show(service, service.request(request_id), full=full)


def _show(service: Service, asked: _Asked, *, full: bool) -> None:
    """Print a request with its card, made here from what was got and checked."""
    request, effect = asked.request, asked.effect
    if isinstance(effect, Changeset):
        sizes = {entry.sha256: entry.size for change in effect.changes for entry in (change.before, change.after)
                 if isinstance(entry, FileEntry)}  # fmt: skip

        def content(sha256: str) -> bytes | None:
            return service.content(request.id, sha256) if sizes.get(sha256, 0) <= MAX_TEXT else None

        card = make_card(effect, content, content)
    else:
        card = make_outside_card(effect)
    approved_by = [one.person for one in asked.decisions if one.verdict is Verdict.APPROVE]
    print_lines([("plain", f"state: {request.state.value}"), *heading(request, asked.now_ns, approved_by),
                 *render(card, max_diff_lines=None if full else 40)])  # fmt: skip


def _is_meant(service: Service, asked: _Asked, digest: str) -> None:
    """See to it that what is approved is what the person saw: here and now, or by the digest that they saw before.

    Raises:
        ApprovalError: it is something else, or they say no.
    """
    if digest:
        if digest != asked.effect.digest:
            raise ApprovalError(
                "What the service shows now is not what has this digest.", hint="Look at it again.",
                kept="Nothing was signed.",
            )  # fmt: skip
        return
    _show(service, asked, full=False)
    if not sys.stdin.isatty():
        raise ApprovalError(
            "There is no terminal to ask at.", hint="Give the digest of what you saw: --digest sha256:...",
            kept="Nothing was signed.",
        )  # fmt: skip
    sys.stderr.write("approve this? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() != "y":
        raise ApprovalError("You did not approve it.", hint="It still waits.", kept="Nothing was signed.")


def answer(
    service: Service, request_id: str, verdict: Verdict, reason: str, part: tuple[str, ...] | None, *,
    digest: str = "", as_json: bool,
) -> Request:  # fmt: skip
    """Sign an answer here and hand it in; return the request as it then stands."""
    asked = service.request(request_id)
    if verdict is Verdict.APPROVE:
        _is_meant(service, asked, digest)
    request, effect = asked.request, asked.effect
    signed = request.digest
    if part is not None:
        if not isinstance(effect, Changeset):
            raise ApprovalError(f"{request_id} is not about files.", hint="Approve it whole, or deny it.")
        signed = effect.part(part).digest
    decision = sign(Decision(
        request_id=request.id, digest=signed, workspace=request.workspace, verdict=verdict, means="service",
        decided_ns=time.time_ns(), expires_ns=request.expires_ns, nonce=secrets.token_hex(16), approver="",
        reason=reason, part=part, policy=request.judged.policy, person=service.name,
    ), service.key)  # fmt: skip
    body = json.dumps(decision_to_json(decision)).encode()
    raw = service.json(f"/v1/requests/{urllib.parse.quote(request_id, safe='')}/decisions", body)
    after = request_from_json(raw.get("request") if isinstance(raw, dict) else None)
    if as_json:
        print_json({"request_id": after.id, "state": after.state.value})
        return after
    waits = duration((after.expires_ns - asked.now_ns) / 1e9)
    who = "whoever asked may do it once"
    if after.effect == "changeset":
        who = f"the worker of {visible(after.home)} publishes it"
    words = {
        State.PENDING: f"{request_id} needs the approval of another person, too ({waits} left)",
        State.APPROVED: f"approved {request_id}: {who}", State.PUBLISHED: f"published {request_id}",
    }.get(after.state, f"{answered(verdict, reason)}; {request_id}: nothing was published")  # fmt: skip
    print(words)
    return after
