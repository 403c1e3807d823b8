"""The bill of materials of an image: CycloneDX 1.6 (cyclonedx.org/docs/1.6/json), one document, reproducible."""

from __future__ import annotations

import json
import uuid
from typing import Any

from luminaguard import __version__
from luminaguard.images.lock import LockedPackage, PackageLock

__all__ = ["bill", "deb_components", "purl", "sbom"]

_NAMESPACE = uuid.UUID("5a0e3c9e-2f0d-5c5b-9d5e-7a1f5f1f3c11")
"""Of our documents' serial numbers; an arbitrary constant."""


def purl(package: LockedPackage, distribution: str) -> str:
    """The package URL (github.com/package-url/purl-spec, type ``deb``)."""
    system = distribution.split("-", maxsplit=1)[0]
    version = package.version.replace(":", "%3A").replace("+", "%2B")
    return f"pkg:deb/{system}/{package.name}@{version}?arch={package.architecture}&distro={distribution}"


def sbom(lock: PackageLock, container: str = "", layers: tuple[str, ...] = ()) -> str:
    """All packages that the image was put together from, with version and SHA-256; and a container, by its layers."""
    components = deb_components(lock)
    for number, layer in enumerate(layers, 1):
        components.append(
            {
                "type": "container",
                "bom-ref": f"layer/{number}",
                "name": f"{container} layer {number}",
                "version": layer,
                "hashes": [{"alg": "SHA-256", "content": layer.removeprefix("sha256:")}],
                "properties": [{"name": "luminaguard:role", "value": "root"}],
            }
        )
    return bill(f"luminaguard-guest-{lock.distribution}", lock.digest[:16], lock.digest + container, components)


def deb_components(lock: PackageLock) -> list[dict[str, Any]]:
    """The packages of a distribution's lock."""
    return [
        {
            "type": "operating-system" if package.role == "kernel" else "library",
            "bom-ref": f"{package.role}/{package.name}",
            "name": package.name,
            "version": package.version,
            "purl": purl(package, lock.distribution),
            "hashes": [{"alg": "SHA-256", "content": package.sha256}],
            "properties": [{"name": "luminaguard:role", "value": package.role}],
        }
        for package in lock.packages
    ]


def bill(name: str, version: str, identity: str, components: list[dict[str, Any]]) -> str:
    """The document over all components of what ``identity`` stands for."""
    document: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, identity)}",
        "version": 1,
        # No timestamp: two builds of one lock are one document.
        "metadata": {
            "component": {
                "type": "operating-system",
                "bom-ref": "image",
                "name": name,
                "version": version,
            },
            "tools": {"components": [{"type": "application", "name": "luminaguard", "version": __version__}]},
        },
        "components": components,
        "dependencies": [{"ref": "image", "dependsOn": sorted(str(c["bom-ref"]) for c in components)}],
    }
    return json.dumps(document, indent=1, sort_keys=True) + "\n"
