"""Which model: what a person writes, the key that it needs, and what would work on this machine."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from luminaguard.errors import ModelUnavailable, SettingsError

__all__ = ["OWN_KEY", "PROVIDERS", "Choice", "find_key", "parse_choices", "what_would_work"]

PROVIDERS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY", "google": "GOOGLE_API_KEY", "ollama": ""}
"""The variables that keys are in; ollama needs none."""
_LOCAL = {"ollama": "http://127.0.0.1:11434/v1", "openai": "http://127.0.0.1:8080/v1"}
"""Where Ollama and llama.cpp's server listen when nobody says otherwise."""
_NAME = re.compile(r"[\w.:/+-]{1,200}", re.ASCII)
_URL = re.compile(r"[a-z]+://[\w.:/\[\]~%-]{1,300}", re.ASCII)
OWN_KEY = "LUMINAGUARD_MODEL_KEY"
_NEAR = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))
_SERVICE = "luminaguard"
_DETECT_S = 0.4


@dataclass(frozen=True, slots=True)
class Choice:
    """One model: ``PROVIDER:NAME``, or ``PROVIDER:NAME@URL``; ``script:FILE`` plays a file."""

    provider: str
    name: str
    url: str = ""

    def __str__(self) -> str:
        return f"{self.provider}:{self.name}" + (f"@{self.url}" if self.url else "")

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine or in its network: then it costs nothing, and may need no key."""
        return bool(self.url) and _is_near(urlsplit(self.url).hostname or "")


def parse_choices(text: str) -> tuple[Choice, ...]:
    """What a person wrote: one model, or several with commas, of which the next is asked when one does not answer.

    Raises:
        SettingsError: it names no model.
    """
    return tuple(_choice(word.strip()) for word in text.split(","))


def _choice(text: str) -> Choice:
    provider, _, rest = text.partition(":")
    if provider == "script" and rest:
        return Choice("script", rest)
    name, _, url = rest.partition("@")
    if provider not in PROVIDERS or not _NAME.fullmatch(name):
        raise SettingsError(
            f"{text[:80]!a} names no model.",
            hint=f"Write PROVIDER:NAME or PROVIDER:NAME@URL; providers are {', '.join(PROVIDERS)}, and script:FILE.",
        )
    if provider == "ollama" and not url:
        url = os.environ.get("OLLAMA_BASE_URL", _LOCAL["ollama"])
    if url:
        _check_url(url)
    return Choice(provider, name, url)


def _check_url(url: str) -> None:
    try:
        split = urlsplit(url)
        host, port = split.hostname or "", split.port
    except ValueError:
        host, port = "", None
        split = urlsplit("")
    del port
    plain = bool(_URL.fullmatch(url)) and split.username is None and split.password is None
    if split.scheme not in {"http", "https"} or not host or not plain:
        raise SettingsError(f"{url[:80]!a} is no address of a model.", hint="Write http://127.0.0.1:8080/v1.")
    if split.scheme == "http" and not _is_near(host):
        raise SettingsError(
            f"{url[:80]!a} would send all that the task reads over the network unencrypted.", hint="Use https."
        )


def _is_near(host: str) -> bool:
    """Whether a host is this machine, or in its own network (RFC 1918, RFC 4193)."""
    if _is_here(host):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in _NEAR if network.version == address.version)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_key(choice: Choice) -> str:
    """The key for a model: from the environment, or from the keyring of the system; empty where none is needed.

    A provider's own key goes to that provider and to nobody else: a server at an address of its own gets what
    ``LUMINAGUARD_MODEL_KEY`` holds, if anything, and that neither goes over a network unencrypted.

    Raises:
        ModelUnavailable: there is none.
    """
    if choice.url:
        key = os.environ.get(OWN_KEY, "")
        split = urlsplit(choice.url)
        return key if split.scheme == "https" or _is_here(split.hostname or "") else ""
    variable = PROVIDERS.get(choice.provider, "")
    if key := os.environ.get(variable, "") or _from_keyring(choice.provider):
        return key
    raise ModelUnavailable(
        f"There is no key for {choice.provider}.",
        hint=f"Set {variable}, or keep it in the system's keyring: 'luminaguard models key {choice.provider}'.",
    )


def _from_keyring(provider: str) -> str:
    import keyring
    from keyring.errors import KeyringError

    try:
        return keyring.get_password(_SERVICE, provider) or ""
    except KeyringError:  # there is none on this machine, or it is locked
        return ""


def keep_key(provider: str, key: str) -> None:
    """Keep a key in the system's keyring.

    Raises:
        SettingsError: there is no such provider, or no keyring.
    """
    import keyring
    from keyring.errors import KeyringError

    if not PROVIDERS.get(provider):
        raise SettingsError(f"{provider[:64]!a} needs no key.", hint="openai, anthropic and google do.")
    try:
        keyring.set_password(_SERVICE, provider, key)
    except KeyringError as error:
        raise SettingsError(
            f"The system's keyring cannot be used: {error}.", hint=f"Set {PROVIDERS[provider]} instead."
        ) from error


def what_would_work() -> list[str]:
    """What could be chosen on this machine: keys that are set, and servers that answer."""
    found = [f"{name}:MODEL (a key is set)" for name, variable in PROVIDERS.items()
             if variable and (os.environ.get(variable) or _from_keyring(name))]  # fmt: skip
    for provider, url in _LOCAL.items():
        for model in _models_at(url)[:5]:
            where = "" if provider == "ollama" else f"@{url}"
            found.append(f"{provider}:{model}{where} (a server answers at {url})")
    return found


def _models_at(url: str) -> list[str]:
    """The models that a server on this machine names; none if there is no server."""
    import http.client

    split = urlsplit(url)
    connection = http.client.HTTPConnection(split.hostname or "", split.port, timeout=_DETECT_S)
    try:
        connection.request("GET", f"{split.path}/models")
        raw: Any = json.loads(connection.getresponse().read(1 << 20))
        names = [str(row["id"]) for row in raw["data"]]
        return [name for name in names if _NAME.fullmatch(name)]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return []
    finally:
        connection.close()
