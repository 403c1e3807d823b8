"""Signing decisions with the approver's Ed25519 key (RFC 8032), over a canonical encoding."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from luminaguard.approvals.model import Decision
from luminaguard.errors import ApprovalError

__all__ = ["key_id", "sign", "verify"]

_DOMAIN = b"luminaguard decision 1\0"


def key_id(key: Ed25519PublicKey) -> str:
    """A short, stable name of a key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(decision: Decision, key: Ed25519PrivateKey) -> Decision:
    """The decision with its signature, and the key's name as its approver."""
    named = dataclasses.replace(decision, approver=key_id(key.public_key()))
    return dataclasses.replace(named, signature=key.sign(_message(named)))


def verify(decision: Decision, key: Ed25519PublicKey) -> None:
    """Check a decision's signature.

    Raises:
        ApprovalError: it was not made with this key, or a field was changed since.
    """
    try:
        if decision.approver != key_id(key):
            raise InvalidSignature
        key.verify(decision.signature, _message(decision))
    except InvalidSignature:
        raise ApprovalError(
            f"The decision about {decision.request_id} is not validly signed by the approver's key.",
            hint="The database was edited, or the key was replaced. Run the command again.",
        ) from None


def _message(decision: Decision) -> bytes:
    fields = {f.name: getattr(decision, f.name) for f in dataclasses.fields(decision) if f.name != "signature"}
    fields["verdict"] = decision.verdict.value
    return _DOMAIN + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")
