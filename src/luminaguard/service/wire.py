"""What goes between approvers and the service, as JSON; both sides read it as an attack."""

from __future__ import annotations

import dataclasses
from typing import Any

from luminaguard.actions.model import Risk, Severity
from luminaguard.approvals.model import Decision, Judged, Request, State, Verdict
from luminaguard.errors import ApprovalError

__all__ = ["decision_from_json", "decision_to_json", "request_from_json", "request_to_json"]

_MOST_PARTS = 20_000


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """All fields of a signed decision."""
    part = None if decision.part is None else list(decision.part)
    return dataclasses.asdict(decision) | {
        "verdict": decision.verdict.value, "signature": decision.signature.hex(), "part": part,
    }  # fmt: skip


def decision_from_json(raw: Any) -> Decision:
    """The inverse; raises ApprovalError if it is not one. The signature is not looked at."""
    try:
        if not isinstance(raw, dict) or set(raw) != {field.name for field in dataclasses.fields(Decision)}:
            raise TypeError("its fields are other ones")
        for name, value in raw.items():
            kind: Any = int if name in {"decided_ns", "expires_ns", "format"} else str
            if name != "part" and (not isinstance(value, kind) or isinstance(value, bool)):
                raise TypeError(f"{name} is no {kind.__name__}")
        part = raw["part"]
        if part is not None and not (
            isinstance(part, list) and len(part) <= _MOST_PARTS and all(isinstance(path, str) for path in part)
        ):
            raise TypeError("part is no list of paths")
        return Decision(**raw | {
            "verdict": Verdict(raw["verdict"]), "signature": bytes.fromhex(raw["signature"]),
            "part": None if part is None else tuple(part),
        })  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ApprovalError(f"This is no decision: {str(error)[:200]}.", hint="Nothing was decided.") from error


def request_to_json(request: Request) -> dict[str, Any]:
    """All fields of a request."""
    judged = dataclasses.asdict(request.judged) | {
        "risk": request.judged.risk.value, "severity": request.judged.severity.value,
    }  # fmt: skip
    return dataclasses.asdict(request) | {
        "state": request.state.value, "judged": judged, "command": list(request.command), "taint": list(request.taint),
    }  # fmt: skip


def request_from_json(raw: Any) -> Request:
    """The inverse; raises ApprovalError if it is not one."""
    try:
        judged = Judged(**raw["judged"] | {
            "risk": Risk(raw["judged"]["risk"]), "severity": Severity(raw["judged"]["severity"]),
        })  # fmt: skip
        request = Request(**raw | {
            "state": State(raw["state"]), "judged": judged, "command": tuple(map(str, raw["command"])),
            "taint": tuple(map(str, raw["taint"])),
        })  # fmt: skip
        for name in ("id", "workspace", "digest", "task", "home", "effect"):
            if not isinstance(getattr(request, name), str):
                raise TypeError(f"{name} is no text")
        for name in ("inode", "exit_code", "created_ns", "expires_ns"):
            if not isinstance(getattr(request, name), int):
                raise TypeError(f"{name} is no number")
        if not all(isinstance(word, str) for word in (judged.reason, judged.rule, judged.policy)):
            raise TypeError("what the rules say is no text")
        if not isinstance(judged.people, int):
            raise TypeError("people is no number")
        return request
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ApprovalError(
            f"The service's answer is no request: {str(error)[:200]}.", hint="Ask who runs the service."
        ) from error
