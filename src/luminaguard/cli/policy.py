"""``luminaguard policy``: what the rules are, how they judge, and which ones your answers suggest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from luminaguard.actions.model import Action, Risk, Severity
from luminaguard.approvals.words import judged_json
from luminaguard.cli.approvals import read_json
from luminaguard.cli.output import print_json
from luminaguard.effects.text import visible
from luminaguard.errors import EXIT_REFUSED, ActionInvalid
from luminaguard.runtime import Runtime
from luminaguard.runtime.policy import built_in_rules, judge
from luminaguard.runtime.suggest import suggestions

__all__ = ["check", "explain", "show", "suggest", "test"]

_MAX_CORPUS = 64 << 20


def check(runtime: Runtime, workspace: Path | None, *, as_json: bool) -> None:
    """Read all rules and list them in the order in which they are looked at."""
    policy = runtime.policy(workspace)
    rows = [{"name": rule.name, "risk": rule.risk.value, "severity": rule.severity.value, "reason": rule.reason,
             "origin": f"{layer.origin}:{line}", "stricter_only": layer in policy.stricter}
            for layer in (*policy.layers, *policy.stricter)
            for rule, line in zip(layer.rules, layer.lines, strict=True)]  # fmt: skip
    if as_json:
        print_json({"status": "valid", "digest": policy.digest, "rules": rows})
        return
    for row in rows:
        print(f"{row['risk']:9}  {row['severity']:8}  {row['name']:32}  {visible(str(row['origin']))}")
    print(f"the rules are valid: {len(rows)} of them, {policy.digest}")


def show() -> None:
    """Print the built-in rules."""
    print(built_in_rules().text, end="")


def explain(runtime: Runtime, file: Path, workspace: Path | None, *, as_json: bool) -> int:
    """Judge one action and say how the rules came to it; return the exit status."""
    action = Action.from_json(read_json(file))
    judgement, judged = judge(runtime.policy(workspace), action)
    if as_json:
        steps = [{"rule": s.rule, "origin": s.origin, "matched": not s.why, "why": s.why} for s in judgement.steps]
        print_json(judged_json(judged) | {"steps": steps})
        return 0
    for step in judgement.steps:
        sign, why = ("=", "matches") if not step.why else (" ", step.why)
        print(f"{sign} {step.rule:36}  {visible(why)}   ({visible(step.origin)})")
    print(f"{judged.risk.value}, {judged.severity.value}: {visible(judged.reason)}")
    print(f"  decided by: {visible(judged.rule)}")
    if judged.people > 1:
        print(f"  {judged.people} different people must approve it")
    return 0


def test(runtime: Runtime, corpus: Path, workspace: Path | None, *, as_json: bool) -> int:
    """Judge every line of a corpus; return the exit status: 122 if any is judged otherwise than expected."""
    policy = runtime.policy(workspace)
    wrong: list[dict[str, Any]] = []
    count = 0
    for number, row in _lines(corpus):
        count += 1
        _, judged = judge(policy, Action.from_json(row["action"]))
        expected = [row["risk"], row.get("severity", judged.severity.value)]
        got = [judged.risk.value, judged.severity.value]
        if expected != got:
            wrong.append({"line": number, "name": row["name"], "expected": expected, "got": got,
                          "rule": judged.rule})  # fmt: skip
    if as_json:
        print_json({"actions": count, "wrong": wrong})
    else:
        for row in wrong:
            told = f"expected {' '.join(row['expected'])}, got {' '.join(row['got'])}"
            print(f"line {row['line']}: {visible(row['name'])}: {told} ({row['rule']})")
        print(f"{count} actions, {len(wrong)} judged otherwise than expected")
    return EXIT_REFUSED if wrong else 0


def _lines(corpus: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    number = 0
    try:
        with corpus.open("rb") as file:
            data = file.read(_MAX_CORPUS + 1)
        if len(data) > _MAX_CORPUS:
            raise ValueError(f"it is larger than {_MAX_CORPUS >> 20} MiB")
        text = data.decode()
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                Risk(row["risk"])
                Severity(row.get("severity", "low"))
                rows.append((number, row | {"action": row["action"], "name": str(row.get("name", ""))}))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        where = f", line {number}," if number else ""
        raise ActionInvalid(
            f"{visible(str(corpus))}{where} cannot be read: {error}.",
            hint='Each line is {"name": ..., "action": {...}, "risk": "GREEN", "severity": "low"}.',
        ) from error
    return rows


def suggest(runtime: Runtime, at_least: int, *, as_json: bool) -> None:
    """Print rules for what was approved again and again; they are only proposed."""
    found = suggestions(runtime, at_least)
    if as_json:
        print_json({"suggestions": [{"toml": s.toml, "name": s.name, "approved": s.approved} for s in found]})
        return
    for suggestion in found:
        print(suggestion.toml)
    if not found:
        sys.stderr.write(f"nothing was approved {at_least} times in the same way, and never denied\n")
    else:
        sys.stderr.write("Nothing was changed: put into luminaguard.toml what you want to hold from now on.\n")
