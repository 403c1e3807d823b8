"""Signing decisions and grants with an approver's Ed25519 key (RFC 8032), over a canonical encoding."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from luminaguard.approvals.grants import Grant
from luminaguard.approvals.model import Decision
from luminaguard.errors import ApprovalError

__all__ = ["Keys", "key_id", "sign", "sign_grant", "sign_ticket", "verify", "verify_grant", "verify_ticket"]

Keys = Mapping[str, Ed25519PublicKey]
"""The approvers of an installation: public keys by :func:`key_id`."""
_DOMAINS = {1: b"luminaguard decision 1\0", 2: b"luminaguard decision 2\0"}
_ADDED = ("reason", "part", "policy", "person", "format")
"""What decisions of format 1 did not have; one that was signed before an upgrade still holds."""
_GRANT = b"luminaguard grant 1\0"
_TICKET = b"luminaguard ticket 1\0"


def key_id(key: Ed25519PublicKey) -> str:
    """A short, stable name of a key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(decision: Decision, key: Ed25519PrivateKey) -> Decision:
    """The decision with its signature, and the key's name as its approver."""
    named = dataclasses.replace(decision, approver=key_id(key.public_key()))
    return dataclasses.replace(named, signature=key.sign(_message(named)))


def verify(decision: Decision, keys: Keys) -> None:
    """Check a decision's signature.

    Raises:
        ApprovalError: it was not made with one of these keys, or a field was changed since.
    """
    try:
        keys[decision.approver].verify(decision.signature, _message(decision))
    except (InvalidSignature, KeyError):
        raise ApprovalError(
            f"The decision about {decision.request_id} is not validly signed by an approver's key.",
            hint="The database was edited, or the key was replaced. Run the command again.",
        ) from None


def sign_ticket(method: str, target: str, now_ns: int, key: Ed25519PrivateKey) -> str:
    """An ``Authorization`` header that lets an approver ask a service for one thing, for a moment.

    Args:
        method: of HTTP.
        target: what is asked, as in the first line of an HTTP request.
        now_ns: nanoseconds since the epoch.
        key: the approver's.
    """
    name = key_id(key.public_key())
    return f"LuminaGuard {name}.{now_ns}.{key.sign(_ticket_message(method, target, name, now_ns)).hex()}"


def verify_ticket(header: str, method: str, target: str, now_ns: int, within_ns: int, keys: Keys) -> str:
    """Whose ticket it is: the name of their key.

    Raises:
        ApprovalError: it is none, is about something else, is older than ``within_ns`` or from the future, or its
            key is not registered.
    """
    scheme, _, rest = header.partition(" ")
    name, _, rest = rest.partition(".")
    time, _, signature = rest.partition(".")
    try:
        if scheme != "LuminaGuard" or not (time.isascii() and time.isdigit() and len(time) < 20):
            raise ValueError
        keys[name].verify(bytes.fromhex(signature), _ticket_message(method, target, name, int(time)))
    except (InvalidSignature, KeyError, ValueError):
        raise ApprovalError("The ticket is not signed by an approver's key.", hint="Ask with a key of yours.") from None
    if abs(now_ns - int(time)) > within_ns:
        raise ApprovalError("The ticket is too old, or from the future.", hint="Check the clock.")
    return name


def sign_grant(grant: Grant, key: Ed25519PrivateKey) -> Grant:
    """The grant with its signature, and the key's name as its approver."""
    named = dataclasses.replace(grant, approver=key_id(key.public_key()))
    return dataclasses.replace(named, signature=key.sign(_grant_message(named)))


def verify_grant(grant: Grant, keys: Keys) -> None:
    """Check a grant's signature.

    Raises:
        ApprovalError: it was not made with one of these keys, or a field was changed since.
    """
    try:
        keys[grant.approver].verify(grant.signature, _grant_message(grant))
    except (InvalidSignature, KeyError):
        raise ApprovalError(
            f"Grant {grant.id} is not validly signed by an approver's key, and is not used.",
            hint=f"The database was edited, or the key was replaced: 'luminaguard grants revoke {grant.id}'.",
        ) from None


def _message(decision: Decision) -> bytes:
    fields = _fields(decision)
    fields["verdict"] = decision.verdict.value
    if decision.format == 1:
        if any(fields[name] not in {"", None, 1} for name in _ADDED):
            raise InvalidSignature
        fields = {name: value for name, value in fields.items() if name not in _ADDED}
    if decision.format not in _DOMAINS:
        raise InvalidSignature
    return _DOMAINS[decision.format] + _canonical(fields)


def _grant_message(grant: Grant) -> bytes:
    return _GRANT + _canonical(
        _fields(grant) | {"scope": grant.scope.to_json(), "limits": dataclasses.asdict(grant.limits)}
    )


def _fields(record: Decision | Grant) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "signature"}


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def _ticket_message(method: str, target: str, name: str, now_ns: int) -> bytes:
    return _TICKET + json.dumps([method, target, name, now_ns]).encode()
