"""``luminaguard image audit``: what an auditor finds in the built image, one line a check."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from luminaguard.cli.output import Progress, colours, print_json
from luminaguard.effects.text import visible
from luminaguard.errors import EXIT_REFUSED
from luminaguard.runtime import Runtime

if TYPE_CHECKING:
    from luminaguard.images.audit import Check
    from luminaguard.runtime.escapes import Result

__all__ = ["audit", "audit_layer"]

_COLOURS = {"pass": "\x1b[32m", "waived": "\x1b[33m", "fail": "\x1b[1;31m"}
_SHOWN = 5


def audit(runtime: Runtime, *, rebuild: bool, live: bool, as_json: bool) -> int:
    """Run all checks and print them; return 0 if none failed (a waiver is no failure, and no pass)."""
    from luminaguard.images import audit as auditor

    image = runtime.images.current()
    progress = Progress(quiet=as_json)
    with progress.slowly("auditing") as step:
        checks = auditor.audit(image, step)
    if rebuild:
        with progress.slowly("building it again") as step:
            different = tuple(runtime.images.rebuild(image, step))
        detail = f"built again: {len(image.manifest.parts) - len(different)} parts have the same SHA-256"
        checks.append(auditor.Check("reproducible", "fail" if different else "pass", detail, different))
    results: list[Result] = []
    if live:
        import anyio

        from luminaguard.runtime.escapes import run_suite
        from luminaguard.runtime.hardening import read_back

        with progress.slowly("reading the kernel's settings back"):
            checks += anyio.run(read_back, runtime)
        with progress.slowly("trying to escape") as step:
            results = anyio.run(run_suite, runtime, step)
        bad = tuple(f"{r.attempt.name}: {r.outcome or r.verdict}" for r in results if r.verdict != "held")
        detail = f"{len(results) - len(bad)} of {len(results)} attempts to escape were made, and failed as they must"
        checks.append(auditor.Check("escapes", "fail" if bad else "pass", detail, bad))
    count = {verdict: sum(check.verdict == verdict for check in checks) for verdict in _COLOURS}
    if as_json:
        status = "fail" if count["fail"] else "pass"
        attempts = [{"name": r.attempt.name, "verdict": r.verdict, "outcome": r.outcome,
                     "techniques": r.attempt.techniques} for r in results]  # fmt: skip
        print_json({"status": status, "image": image.folder.name, **count, "checks": [asdict(c) for c in checks],
                    "attempts": attempts})  # fmt: skip
    else:
        for check in checks:
            _show(check)
        print(f"image {image.id}: {count['pass']} passed, {count['waived']} waived, {count['fail']} failed")
    return EXIT_REFUSED if count["fail"] else 0


def audit_layer(runtime: Runtime, server: str, *, rebuild: bool, as_json: bool) -> int:
    """The same of the layer of a server; return 0 if no check failed."""
    from luminaguard.errors import SettingsError
    from luminaguard.images.audit import Check
    from luminaguard.images.audit import audit_layer as look
    from luminaguard.images.layers.build import rebuild_layer
    from luminaguard.images.layers.store import DISK, PARTS
    from luminaguard.runtime.mcp import McpServers

    if not (layer_id := getattr(McpServers(runtime).settings(server), "layer", "")):
        raise SettingsError(f"The server {server!a} has no layer.", hint="Servers of --npm and --pypi have one.")
    layer = runtime.layers.load(layer_id)
    progress = Progress(quiet=as_json)
    with progress.slowly("auditing"):
        for part in PARTS:
            layer.read(part)
        whole = Check("integrity", "pass", f"{len(PARTS)} parts have the SHA-256 of their manifest")
        checks = [whole, *look(layer.folder / DISK, runtime.layers.folder)]
    if rebuild:
        with progress.slowly("building it again") as step:
            same = rebuild_layer(runtime.layers, layer, runtime.images.current(), runtime.images.packages, step)
        detail = f"built again from its lock: {'the same SHA-256' if same else 'not the same'}"
        checks.append(Check("reproducible", "pass" if same else "fail", detail, () if same else (DISK,)))
    count = {verdict: sum(check.verdict == verdict for check in checks) for verdict in _COLOURS}
    if as_json:
        status = "fail" if count["fail"] else "pass"
        print_json({"status": status, "layer": layer_id, **count, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            _show(check)
        print(f"{layer.name}: {count['pass']} passed, {count['waived']} waived, {count['fail']} failed")
    return EXIT_REFUSED if count["fail"] else 0


def _show(check: Check) -> None:
    colour, end = (_COLOURS[check.verdict], "\x1b[0m") if colours(sys.stdout) else ("", "")
    print(f"{colour}{check.verdict:6}{end}  {check.name:15}  {check.detail}")
    for label, names in (("fault", check.faults), ("waived", check.waived)):
        shown = ", ".join(visible(name) for name in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        if names:
            print(f"{'':8}{label}: {shown}{more}")
    for reason in check.reasons:
        print(f"{'':8}because: {reason}")
