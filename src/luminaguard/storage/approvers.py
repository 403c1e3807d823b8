"""The people who may approve: the owner of this installation, and others by name.

The owner's key lies in a file of mode 0600, like an SSH key without a passphrase. Another person's is
encrypted with a passphrase that only they know (scrypt, RFC 7914, and ChaCha20-Poly1305, RFC 8439), so
that one person cannot answer for two. Which keys count is what lies in the folder of keys.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from luminaguard.approvals.signing import Keys, key_id
from luminaguard.errors import ApprovalError, StorageError
from luminaguard.storage.keys import load_key

__all__ = ["OWNER", "Approvers"]

OWNER = "owner"
_RESERVED = frozenset({OWNER, "rule", "grant"})
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_MAX_FILE = 4096
_SCRYPT = {"length": 32, "n": 1 << 15, "r": 8, "p": 1}
_SHORTEST = 8


class Approvers:
    """The keys of a state folder."""

    def __init__(self, keys: Path) -> None:
        self._keys = keys
        self._folder = keys / "approvers"

    def public(self) -> Keys:
        """All public keys by their names."""
        owner = load_key(self._keys, "approver").public_key()
        return {key_id(owner): owner} | {key_id(key): key for key in self.people().values()}

    def people(self) -> dict[str, Ed25519PublicKey]:
        """The other people, by name."""
        found = {}
        for path in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else ():
            found[path.stem] = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self._read(path)["public"]))
        return found

    def owner(self) -> Ed25519PrivateKey:
        """The key of whoever owns this installation."""
        return load_key(self._keys, "approver")

    def add(self, name: str, passphrase: str) -> Ed25519PublicKey:
        """Make a key for another person.

        Raises:
            ApprovalError: the name is taken or not a name, or the passphrase is too short.
        """
        if name in _RESERVED or not _NAME.fullmatch(name):
            raise ApprovalError(f"{name!a} cannot be the name of an approver.", hint="Use small letters and digits.")
        if len(passphrase) < _SHORTEST:
            raise ApprovalError(
                f"The passphrase has less than {_SHORTEST} characters.",
                hint="Choose a longer one.",
            )
        key = Ed25519PrivateKey.generate()
        salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
        sealed = ChaCha20Poly1305(_derive(passphrase, salt)).encrypt(nonce, key.private_bytes_raw(), name.encode())
        fields = {"public": key.public_key().public_bytes_raw(), "salt": salt, "nonce": nonce, "sealed": sealed}
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            fd = os.open(self._folder / f"{name}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise ApprovalError(
                f"There is an approver {name!a} already.", hint="See 'luminaguard approvers list'."
            ) from None
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(json.dumps({field: value.hex() for field, value in fields.items()}))
        return key.public_key()

    def remove(self, name: str) -> None:
        """Let a person's approvals count no more, those that were given and not used among them."""
        self._path(name).unlink()

    def unlock(self, name: str, passphrase: str) -> Ed25519PrivateKey:
        """A person's key.

        Raises:
            ApprovalError: there is none of this name, or the passphrase is not theirs.
        """
        fields = {field: bytes.fromhex(value) for field, value in self._read(self._path(name)).items()}
        try:
            cipher = ChaCha20Poly1305(_derive(passphrase, fields["salt"]))
            raw = cipher.decrypt(fields["nonce"], fields["sealed"], name.encode())
        except InvalidTag:
            raise ApprovalError(
                f"This is not the passphrase of {name}.", hint="Nothing was decided; try again."
            ) from None
        return Ed25519PrivateKey.from_private_bytes(raw)

    def _path(self, name: str) -> Path:
        path = self._folder / f"{name}.json"
        if not _NAME.fullmatch(name) or not path.is_file():
            raise ApprovalError(f"There is no approver {name[:64]!a}.", hint="See 'luminaguard approvers list'.")
        return path

    @staticmethod
    def _read(path: Path) -> dict[str, str]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "r", encoding="ascii") as file:
                info = os.fstat(file.fileno())
                if info.st_uid != os.geteuid() or info.st_mode & 0o077:
                    raise ValueError("it must be yours and have mode 0600")
                fields = json.loads(file.read(_MAX_FILE))
            for value in fields.values():
                bytes.fromhex(value)
            return {name: fields[name] for name in ("public", "salt", "nonce", "sealed")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"The approver's key {path} cannot be used: {error}.", hint="Restore it, or remove the approver."
            ) from error


def _derive(passphrase: str, salt: bytes) -> bytes:
    return Scrypt(salt=salt, **_SCRYPT).derive(passphrase.encode())
