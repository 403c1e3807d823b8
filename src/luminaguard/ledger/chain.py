"""The hash chain and its signed checkpoints.

Each entry's hash covers its number, time, kind, body and the hash before it, so changing, removing
or reordering an entry breaks every later hash. A checkpoint signs a number and a hash with the
ledger's Ed25519 key; the newest one is kept outside of the database too, so cutting off the end or
putting back an older database is noticed as well. Who holds the key can still write another
history: the ledger protects against everyone else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from luminaguard.errors import LedgerError

__all__ = [
    "GENESIS",
    "Checkpoint",
    "Entry",
    "body_text",
    "next_entry",
    "sign_checkpoint",
    "verify_chain",
    "verify_checkpoint",
    "verify_entry",
]

GENESIS = "0" * 64
_DOMAIN = b"luminaguard ledger 1\0"
_CHECKPOINT = b"luminaguard checkpoint 1\0"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened. ``body`` is JSON text, kept as the bytes that were hashed."""

    seq: int
    time_ns: int
    kind: str
    body: str
    previous: str
    hash: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A signature over everything up to and including entry ``seq``."""

    seq: int
    hash: str
    signature: bytes


def body_text(body: dict[str, Any]) -> str:
    """What an entry keeps of a body; raises TypeError or ValueError if that is no JSON."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def next_entry(last: Entry | None, time_ns: int, kind: str, text: str) -> Entry:
    """The entry that follows ``last`` (None: the first one, number 1)."""
    seq, previous = (last.seq + 1, last.hash) if last else (1, GENESIS)
    return Entry(seq, time_ns, kind, text, previous, _hash(seq, time_ns, kind, text, previous))


def verify_entry(entry: Entry) -> None:
    """Check that an entry is as it was written; that it stands in the chain is not checked. Raises LedgerError."""
    if entry.hash != _hash(entry.seq, entry.time_ns, entry.kind, entry.body, entry.previous):
        raise _broken(f"entry {entry.seq} was changed after it was written")


def sign_checkpoint(entry: Entry, key: Ed25519PrivateKey) -> Checkpoint:
    """Sign the chain up to this entry."""
    return Checkpoint(entry.seq, entry.hash, key.sign(_message(entry.seq, entry.hash)))


def verify_checkpoint(checkpoint: Checkpoint, key: Ed25519PublicKey) -> None:
    """Check a checkpoint's signature; raises LedgerError."""
    try:
        key.verify(checkpoint.signature, _message(checkpoint.seq, checkpoint.hash))
    except InvalidSignature:
        raise _broken(f"the checkpoint at entry {checkpoint.seq} is not signed by the ledger's key") from None


def verify_chain(entries: Iterable[Entry], checkpoints: Iterable[Checkpoint], key: Ed25519PublicKey) -> int:
    """Verify all of it; return the number of entries.

    Args:
        entries: in the order of their numbers.
        checkpoints: any, in any order; each must lie on the chain.
        key: the ledger's public key.

    Raises:
        LedgerError: it names the first entry that is wrong, and how.
    """
    wanted: dict[int, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        verify_checkpoint(checkpoint, key)
        wanted.setdefault(checkpoint.seq, []).append(checkpoint)
    previous, count = GENESIS, 0
    for entry in entries:
        count += 1
        if entry.seq != count:
            raise _broken(f"entry {count} is missing (the next one is {entry.seq})")
        if entry.previous != previous:
            raise _broken(f"entry {entry.seq} does not follow the one before it")
        verify_entry(entry)
        for checkpoint in wanted.pop(entry.seq, []):
            if checkpoint.hash != entry.hash:
                raise _broken(f"entry {entry.seq} is not the one that a checkpoint was signed for")
        previous = entry.hash
    if wanted:
        raise _broken(f"it ends at entry {count}, but entry {max(wanted)} was signed: its end was cut off")
    return count


def _hash(seq: int, time_ns: int, kind: str, body: str, previous: str) -> str:
    fields = (
        str(seq).encode(),
        str(time_ns).encode(),
        kind.encode(),
        body.encode(),
        previous.encode(),
    )
    digest = hashlib.sha256(_DOMAIN)
    for field in fields:
        digest.update(len(field).to_bytes(8, "big") + field)
    return digest.hexdigest()


def _message(seq: int, entry_hash: str) -> bytes:
    return _CHECKPOINT + f"{seq}:{entry_hash}".encode()


def _broken(why: str) -> LedgerError:
    return LedgerError(
        f"The ledger does not verify: {why}.",
        hint="Keep the files as they are, export what verifies ('luminaguard ledger export') and find out "
        "who could write to the state folder.",
        kept="Nothing was deleted.",
    )
