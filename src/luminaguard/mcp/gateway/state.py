"""What a client carries between a question and its answer: sealed, bound to one call, for a while, for once.

Whoever calls carries it, so it is the attacker's to change (revision 2026-07-28, "Multi Round-Trip Requests").
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Seal"]

_MOST = 4096


@dataclass(slots=True)
class Seal:
    """Seals and opens, with a key that ends with this process.

    Attributes:
        seconds: for how long a state is good.
    """

    seconds: float = 600.0
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    _used: dict[str, float] = field(default_factory=dict)

    def close(self, request_id: str, tool: str, arguments: Mapping[str, Any], now: float) -> str:
        """The state of a question about a call."""
        said = json.dumps({"request": request_id, "call": _digest(tool, arguments), "until": now + self.seconds,
                           "nonce": secrets.token_hex(16)}).encode()  # fmt: skip
        return base64.urlsafe_b64encode(self._mac(said) + said).decode()

    def open(self, state: str, request_id: str, tool: str, arguments: Mapping[str, Any], now: float) -> bool:
        """Whether a state is one of a question about this very call, in time, and not used before; it is now."""
        try:
            raw = base64.urlsafe_b64decode(state[:_MOST].encode("ascii"))
        except (ValueError, UnicodeEncodeError):
            return False
        mac, said = raw[:32], raw[32:]
        if not hmac.compare_digest(mac, self._mac(said)):
            return False
        found = json.loads(said)  # ours, since its seal holds
        self._used = {nonce: until for nonce, until in self._used.items() if until > now}
        good: bool = (
            found["until"] > now and found["nonce"] not in self._used and found["request"] == request_id
            and hmac.compare_digest(found["call"], _digest(tool, arguments))
        )  # fmt: skip
        self._used[found["nonce"]] = found["until"]
        return good

    def _mac(self, said: bytes) -> bytes:
        return hmac.digest(self._key, said, "sha256")


def _digest(tool: str, arguments: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([tool, dict(arguments)], sort_keys=True).encode()).hexdigest()
