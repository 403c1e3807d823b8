"""The approvals over HTTP: who has a registered key may look, and answer with a decision that this key signed.

    GET  /v1/requests[?all=1]             what waits, or all
    GET  /v1/requests/ID                  one, with its effect and what was decided
    GET  /v1/requests/ID/contents/SHA256  a content of its effect, for diffs
    POST /v1/requests/ID/decisions        a signed decision

Each call carries a ticket: what is asked, and when, signed with the approver's key. An approver has no right in the
database; all that a decision can do is what the same decision could do at the command line, and no less is checked.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from luminaguard import log
from luminaguard.approvals.model import State
from luminaguard.approvals.signing import verify_ticket
from luminaguard.approvals.words import request_json
from luminaguard.effects.card import MAX_TEXT
from luminaguard.effects.changes import Changeset, FileEntry
from luminaguard.errors import ApprovalError, LuminaGuardError, RequestNotFound, StorageError
from luminaguard.service.wire import decision_from_json, decision_to_json, request_to_json

if TYPE_CHECKING:
    from luminaguard.runtime import Runtime

__all__ = ["build"]

_MOST_BODY = 4 << 20
_TICKET_S = 60
Endpoint = Callable[[HttpRequest], Awaitable[Response]]


def build(runtime: Runtime) -> Starlette:
    """The application of one runtime."""
    service = _Service(runtime)
    routes = [
        Route("/v1/requests", _answering(service.requests), methods=["GET"]),
        Route("/v1/requests/{id}", _answering(service.request), methods=["GET"]),
        Route("/v1/requests/{id}/contents/{sha256}", _answering(service.content), methods=["GET"]),
        Route("/v1/requests/{id}/decisions", _answering(service.decide), methods=["POST"]),
    ]
    return Starlette(routes=routes)


class _Refused(Exception):
    """An answer that is none."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class _Service:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def _approver(self, request: HttpRequest) -> str:
        """Whose ticket it is: the name of their key; raises _Refused."""
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        approvers = self._runtime.approvers.public()
        now_ns = self._runtime.ledger.current_time()
        header = request.headers.get("authorization", "")
        try:
            return verify_ticket(header, request.method, target, now_ns, _TICKET_S * 10**9, approvers)
        except ApprovalError as error:
            log.event("service.refused", why=error.message)
            raise _Refused(401, error.message) from None

    def requests(self, request: HttpRequest, body: bytes) -> Response:
        """What waits."""
        del body
        self._approver(request)
        found = self._runtime.approvals.list(everything=request.query_params.get("all") == "1")
        return JSONResponse({"requests": [request_json(one) for one in found]})

    def request(self, request: HttpRequest, body: bytes) -> Response:
        """One request, judged by the rules that hold now."""
        del body
        self._approver(request)
        runtime = self._runtime
        asked = runtime.decisions.looked_at(runtime.approvals.get(request.path_params["id"]))
        effect = runtime.approvals.effect(asked.id)
        decisions = [decision_to_json(one) for one in runtime.approvals.decisions(asked.id)]
        return JSONResponse({
            "request": request_to_json(asked), "effect": effect.to_json(), "decisions": decisions,
            "outcome": runtime.approvals.outcome(asked.id), "now_ns": runtime.ledger.current_time(),
        })  # fmt: skip

    def content(self, request: HttpRequest, body: bytes) -> Response:
        """A content, before or after, of a request's changes; whoever gets it compares its SHA-256."""
        del body
        self._approver(request)
        asked, sha256 = self._runtime.approvals.get(request.path_params["id"]), request.path_params["sha256"]
        effect = self._runtime.approvals.effect(asked.id)
        if not isinstance(effect, Changeset):
            raise _Refused(404, "it has no contents")
        entries = [entry for change in effect.changes for entry in (change.before, change.after)]
        if not any(isinstance(entry, FileEntry) and entry.sha256 == sha256 for entry in entries):
            raise _Refused(404, "it has no such content")
        with self._runtime.decisions.contents(asked, effect) as (before, after):
            data = after(sha256)
            data = before(sha256) if data is None else data
        if data is None or len(data) > MAX_TEXT:
            raise _Refused(404, "this content is not kept, or too large to be shown")
        return Response(data, media_type="application/octet-stream")

    def decide(self, request: HttpRequest, body: bytes) -> Response:
        """Take a signed decision."""
        approver = self._approver(request)
        try:
            raw = json.loads(body)
        except (ValueError, RecursionError):
            raise _Refused(400, "this is no JSON") from None
        decision = decision_from_json(raw)
        if decision.request_id != request.path_params["id"] or decision.approver != approver:
            raise _Refused(403, "the decision is about another request, or somebody else's")
        after = self._runtime.decisions.accept(decision)
        here = after.effect == "changeset" and after.home == self._runtime.host
        log.event("service.decided", request=after.id, person=decision.person, verdict=decision.verdict.value)
        if here and after.state is State.APPROVED:  # the folder is on this very host
            try:
                self._runtime.decisions.publish(after.id)
            except LuminaGuardError as error:
                state = self._runtime.approvals.get(after.id).state
                if state not in {State.CLAIMED, State.PUBLISHED}:  # a worker may just be doing it
                    raise _Refused(409, f"It was approved, and could not be published: {error.message} {error.hint} "
                                   f"The request is {state.value}.") from error  # fmt: skip
            after = self._runtime.approvals.get(after.id)
        return JSONResponse({"request": request_to_json(after), "outcome": self._runtime.approvals.outcome(after.id)})


def _answering(endpoint: Callable[[HttpRequest, bytes], Response]) -> Endpoint:
    """An endpoint that works in a thread, with a bounded body, and whose refusals are JSON."""

    async def answer(request: HttpRequest) -> Response:
        try:
            body = await _body(request)
            return await anyio.to_thread.run_sync(endpoint, request, body)
        except _Refused as error:
            return _error(error.status, {"type": "Refused", "message": error.message, "hint": ""})
        except LuminaGuardError as error:
            status = 404 if isinstance(error, RequestNotFound) else 503 if isinstance(error, StorageError) else 409
            told = {"type": type(error).__name__, "message": error.message, "hint": error.hint, "kept": error.kept}
            return _error(status, told)

    return answer


async def _body(request: HttpRequest) -> bytes:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > _MOST_BODY:
            raise _Refused(413, "that is too long")
    return bytes(data)


def _error(status: int, told: dict[str, Any]) -> Response:
    return JSONResponse({"error": told}, status_code=status)
