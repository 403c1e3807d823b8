"""What the stand-in's API does, and when it refuses: the phases of a machine, without a socket in sight."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import fastjsonschema

from luminaguard.testing.firecracker.guest import Guest

__all__ = ["Machine", "Refused"]

_ID = re.compile(r"/(drives)/([A-Za-z0-9_]+)$")
_BEFORE = "The requested operation is not supported before starting the microVM."
_AFTER = "The requested operation is not supported after starting the microVM."
_MAGIC = "stand-in for a Firecracker snapshot"
_SECTIONS = {
    "boot-source": "/boot-source", "machine-config": "/machine-config", "vsock": "/vsock", "entropy": "/entropy",
    "balloon": "/balloon", "logger": "/logger", "metrics": "/metrics",
}  # fmt: skip


def _read_api() -> tuple[dict[str, dict[str, str]], dict[str, Callable[[Any], Any]]]:
    """The schema of each route, and a check for each schema."""
    raw = json.loads((resources.files("luminaguard.testing.firecracker") / "api.json").read_text(encoding="utf-8"))
    definitions = raw["definitions"]
    checks = {
        name: fastjsonschema.compile({"$ref": f"#/definitions/{name}", "definitions": definitions})
        for name in definitions
    }
    return raw["routes"], checks


_ROUTES, _CHECKS = _read_api()  # at once: in the jail there is nothing left to read


class Refused(Exception):
    """The API answers 400 with this as its ``fault_message``."""


class Fatal(Exception):
    """The real program exits here."""


class Machine:
    """One Firecracker process: not started, running or paused."""

    def __init__(self, name: str, version: str) -> None:
        self.id = name
        self.version = version
        self.state = "Not started"
        self.vsock = ""
        self.connectable = True
        self.guest: Guest | None = None
        self._config: dict[str, Any] = {}
        self._disks: dict[str, str] = {}
        self._had_metrics = False
        self._was_saved = True

    def start_from(self, config: dict[str, Any]) -> None:
        """Boot from a configuration file; ``drives`` is mandatory in it."""
        for drive in config.pop("drives"):
            self.request("PUT", f"/drives/{drive['drive_id']}", drive)
        for section, body in config.items():
            self.request("PUT", _SECTIONS[section], body)
        self.request("PUT", "/actions", {"action_type": "InstanceStart"})

    def request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any] | None:
        """Answer one request; None is 204.

        Raises:
            Refused: it may not be asked, or not now.
            Fatal: the process has to end.
        """
        if method == "GET":
            if body is not None:
                raise Refused("GET request cannot have a body.")
            return self._get(path)
        match = _ID.match(path)
        route = "/drives/{drive_id}" if match else path
        schema = _ROUTES.get(route, {}).get(method)
        if schema is None:
            raise Refused(f"Invalid request method and/or path: {method} {path}.")
        if body is None:
            raise Refused(f"Empty {method} request.")
        try:
            _CHECKS[schema](body)
        except fastjsonschema.JsonSchemaValueException as error:
            raise Refused(f"An error occurred when deserializing the json body of a request: {error}") from None
        if match and body["drive_id"] != match[2]:
            raise Refused("The id from the path does not match the id from the body!")
        handler = getattr(self, f"_{method.lower()}_{route.split('/')[1].replace('-', '_')}")
        handler(body, route)
        return None

    def save(self, snapshot: str, memory: str) -> None:
        """Write what a full snapshot writes: all of the memory, and the state that goes with it."""
        assert self.guest is not None
        size = int(self._config["/machine-config"]["mem_size_mib"]) << 20
        with open(memory, "wb") as file:
            file.truncate(size)
            file.write(json.dumps(self.guest.memory).encode())
        state = {"magic": _MAGIC, "version": self.version, "disks": self._disks, "vsock": self.vsock, "size": size,
                 "config": self._config}  # fmt: skip
        Path(snapshot).write_text(json.dumps(state), encoding="utf-8")

    # -- what the requests do ---------------------------------------------------------------------

    def _get(self, path: str) -> dict[str, Any]:
        if path == "/":
            return {"app_name": "Firecracker", "id": self.id, "state": self.state, "vmm_version": self.version}
        if path == "/version":
            return {"firecracker_version": self.version}
        raise Refused(f"Invalid request method and/or path: GET {path}.")

    def _before_start(self) -> None:
        if self.state != "Not started":
            raise Refused(_AFTER)

    def _after_start(self) -> None:
        if self.state == "Not started":
            raise Refused(_BEFORE)

    def _configure(self, body: dict[str, Any], route: str) -> None:
        self._before_start()
        self._config[route] = body

    _put_entropy = _put_balloon = _put_machine_config = _patch_machine_config = _configure

    def _put_boot_source(self, body: dict[str, Any], route: str) -> None:
        for path in (body["kernel_image_path"], body.get("initrd_path")):
            if path and not os.access(path, os.R_OK):
                raise Refused(f"The kernel file cannot be opened: {path}")
        self._configure(body, route)

    def _put_drives(self, body: dict[str, Any], route: str) -> None:
        self._configure(body, f"{route} {body['drive_id']}")
        self._open_disk(body["path_on_host"])
        self._disks[body["drive_id"]] = body["path_on_host"]

    def _patch_drives(self, body: dict[str, Any], _route: str) -> None:
        self._after_start()
        if body["drive_id"] not in self._disks:
            raise Refused(f"Invalid block device ID: {body['drive_id']}")
        self._open_disk(body["path_on_host"])
        self._disks[body["drive_id"]] = body["path_on_host"]

    def _patch_balloon(self, body: dict[str, Any], _route: str) -> None:
        self._after_start()
        if "/balloon" not in self._config:
            raise Refused("No balloon device found.")
        self._config["/balloon"]["amount_mib"] = body["amount_mib"]

    def _put_vsock(self, body: dict[str, Any], route: str) -> None:
        if body["guest_cid"] < 3:
            raise Refused("The guest CID is invalid")
        self._configure(body, route)

    def _put_logger(self, body: dict[str, Any], _route: str) -> None:
        self._before_start()
        if not os.access(body["log_path"], os.W_OK):
            raise Refused(f"Failed to open target file: {body['log_path']}")

    def _put_metrics(self, body: dict[str, Any], _route: str) -> None:
        self._before_start()
        if self._had_metrics or not os.access(body["metrics_path"], os.W_OK):
            raise Refused("Cannot initialize the metrics system")
        self._had_metrics = True

    def _put_actions(self, body: dict[str, Any], _route: str) -> None:
        if body["action_type"] != "InstanceStart":
            self._after_start()
            return
        self._before_start()
        if "/boot-source" not in self._config:
            raise Refused("Cannot start microvm without kernel configuration.")
        self.guest = Guest({"files": [], "drawn": 0}, self._disks)
        self._bind(self._config["/vsock"]["uds_path"])
        self.state = "Running"

    def _patch_vm(self, body: dict[str, Any], _route: str) -> None:
        self._after_start()
        if body["state"] == "Resumed" and not self._was_saved and self.version.startswith("1.16."):
            self.connectable = False  # Firecracker #6100
        if body["state"] == "Paused":
            self._was_saved = False
        self.state = {"Paused": "Paused", "Resumed": "Running"}[body["state"]]

    def _put_snapshot(self, body: dict[str, Any], route: str) -> None:
        if route == "/snapshot/create":
            self._after_start()
            if self.state != "Paused":
                raise Refused("Create snapshot error: Cannot save the microVM state: the microVM is not paused")
            try:
                self.save(body["snapshot_path"], body["mem_file_path"])
            except OSError as error:
                raise Refused(f"Create snapshot error: {error.strerror} (os error {error.errno})") from error
            self._was_saved = True
            return
        self._before_start()
        if self._config:
            raise Refused(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
            )
        if ("mem_backend" in body) == ("mem_file_path" in body):
            raise Refused("missing field: either `mem_backend` or `mem_file_path` is required")
        try:
            self._load(body)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Fatal(f"Failed to restore from snapshot: {error!r}") from error

    def _load(self, body: dict[str, Any]) -> None:
        state = json.loads(Path(body["snapshot_path"]).read_text(encoding="utf-8"))
        if state["magic"] != _MAGIC or state["version"] != self.version:
            raise ValueError("not a snapshot of this version")
        with open(body["mem_backend"]["backend_path"], "rb") as file:
            memory = json.loads(file.read(1 << 16).rstrip(b"\0"))
            if os.fstat(file.fileno()).st_size != state["size"]:
                raise ValueError("the memory file has another size")
        for path in state["disks"].values():
            self._open_disk(path)
        self._disks, self._config = state["disks"], state["config"]
        self.guest = Guest(memory, self._disks)
        if "vsock_override" in body and not self.version.startswith(("1.16.", "1.17.")):
            raise ValueError("unknown field `vsock_override`")
        self._bind(body.get("vsock_override", {}).get("uds_path", state["vsock"]))
        self.state = "Running" if body.get("resume_vm") else "Paused"

    def _open_disk(self, path: str) -> None:
        if not os.access(path, os.R_OK):
            raise Refused(f"Unable to open the block device backing file: {path}")

    def _bind(self, path: str) -> None:
        if os.path.lexists(path):
            raise OSError(98, "Address already in use", path)
        self.vsock = path
