"""The layers of one folder, each in ``<id>/`` with its manifest, disk, lock and bill of materials."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from luminaguard.errors import ImageMissing
from luminaguard.images.manifest import Image, Part, open_sealed, read_manifest

__all__ = ["DISK", "LOCK", "PARTS", "SBOM", "Layer", "LayerManifest", "LayerStore", "Source"]

DISK, LOCK, SBOM = "layer.squashfs", "lock.json", "sbom.cdx.json"
PARTS = (DISK, LOCK, SBOM)
_FORMAT = 1
_ADD_AGAIN = "add its server again"
_ID = re.compile(r"[0-9a-f]{64}")

Source = Literal["npm", "pypi"]


@dataclass(frozen=True, slots=True)
class LayerManifest:
    """What a layer is made of.

    Attributes:
        source: where its packages are from.
        package, version: what was asked for, at the version that was found.
        programs: names of what it puts into /usr/bin that a person would start.
        distribution: of the image that it lies on, such as ``debian-12``.
        packages: how many packages it is made of.
        parts: size and SHA-256 of each of :data:`PARTS`.
    """

    source: Source
    package: str
    version: str
    programs: tuple[str, ...]
    distribution: str
    packages: int
    parts: dict[str, Part]

    def dumps(self) -> str:
        """Canonical JSON; its SHA-256 names the layer."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True, indent=1) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`dumps`, in hex."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()

    @classmethod
    def loads(cls, text: str) -> LayerManifest:
        """Parse a manifest; raises ValueError, KeyError or TypeError when it is none."""
        raw: dict[str, Any] = json.loads(text)
        if raw.pop("format") != _FORMAT:
            raise ValueError("it is of another version of LuminaGuard")
        raw["parts"] = {str(k): Part(int(v["size"]), str(v["sha256"])) for k, v in raw["parts"].items()}
        if set(raw["parts"]) != set(PARTS):
            raise ValueError("it does not name the parts of a layer")
        raw["programs"] = tuple(map(str, raw["programs"]))
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer whose manifest matches its name. Its disk is verified when it is opened."""

    folder: Path
    manifest: LayerManifest

    @property
    def name(self) -> str:
        """What people call it, such as ``npm:@scope/server@1.2.3``."""
        return f"{self.manifest.source}:{self.manifest.package}@{self.manifest.version}"

    def open_on(self, image: Image) -> int:
        """A sealed copy of its disk in memory, verified, for a machine of this image; the caller owns it.

        Raises:
            ImageTampered: it is not what the manifest says.
            ImageMissing: it was built for another image.
        """
        if image.manifest.container or image.manifest.distribution != self.manifest.distribution:
            raise ImageMissing(
                f"The layer {self.name} lies on an image of {self.manifest.distribution}, and machines use another.",
                hint="Use that image ('luminaguard image use'), or add the server again.",
            )
        return open_sealed(self.folder / DISK, self.manifest.parts[DISK], self.folder, _ADD_AGAIN)

    def read(self, part: str) -> bytes:
        """A part that is text; raises ImageTampered."""
        with open(open_sealed(self.folder / part, self.manifest.parts[part], self.folder, _ADD_AGAIN), "rb") as file:
            return file.read()


class LayerStore:
    """The layers of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self, used: Collection[str]) -> None:
        """Delete the layers that no server uses; a machine that runs has a copy of its own."""
        for entry in self.folder.glob("*"):
            if _ID.fullmatch(entry.name) and entry.name not in used:
                shutil.rmtree(entry, ignore_errors=True)

    def load(self, layer_id: str) -> Layer:
        """A layer by its id.

        Raises:
            ImageMissing: there is none.
            ImageTampered: its manifest is damaged, or others can write to it.
        """
        if not _ID.fullmatch(layer_id) or not (self.folder / layer_id).is_dir():
            raise ImageMissing(
                f"The layer {layer_id[:12]!a} is not on this machine.",
                hint="Add the server again: 'luminaguard mcp remove' and 'luminaguard mcp add --npm' or '--pypi'.",
            )
        folder = self.folder / layer_id
        return Layer(folder, read_manifest(folder, LayerManifest.loads, _ADD_AGAIN))
