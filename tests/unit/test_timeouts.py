"""docs/timeouts.md lists each wait of the system, with its limit; this keeps the list complete and right."""

import ast
import re
from pathlib import Path

import pytest

from luminaguard.mcp.balancing import Tuning
from luminaguard.mcp.http import Times
from luminaguard.settings import GatewaySettings, HttpServer, Settings, StdioServer

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "src" / "luminaguard"
WAITING = {"fail_after", "move_on_after", "sleep", "join"}


def value_of(node):
    """The number, or numbers, of an expression without names."""
    return eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}})  # of our own source


def names_of(tree):
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name) and name.id.endswith("_S"):
                    yield name.id, value_of(value)


def literals_of(tree):
    """Numbers that stand in a call that waits."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in {"notify", "call_from_thread"}:
            continue  # for how long something is shown
        given = [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg and "timeout" in keyword.arg]
        given += [(function, argument) for argument in node.args[:1] if function in WAITING]
        for name, value in given:
            if isinstance(value, ast.Constant) and isinstance(value.value, int | float) and value.value:
                yield f"{function}({name})" if name != function else function, value.value


def waits():
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if path.is_relative_to(SOURCE / "testing"):
            continue
        tree = ast.parse(path.read_text())
        for name, value in (*names_of(tree), *literals_of(tree)):
            found[f"{path.relative_to(SOURCE)} {name}", str(value)] = True
    for prefix, model in (("", Settings), ("mcp_servers.", HttpServer), ("mcp_servers.", StdioServer),
                          ("gateway.", GatewaySettings)):  # fmt: skip
        for name, field in model.model_fields.items():
            if name.endswith("_s"):
                found[f"luminaguard.toml {prefix}{name}", str(field.default)] = True
    for kind in (Tuning, Times):
        for name in kind.__slots__:
            if name.endswith("_s"):
                default = kind.__dataclass_fields__[name].default
                found[f"{kind.__name__} {name}", str(default) if isinstance(default, float | int) else "-"] = True
    return set(found)


def documented():
    rows = re.findall(
        r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", (ROOT / "docs" / "timeouts.md").read_text(), re.MULTILINE
    )
    return [(name, value.strip()) for name, value in rows]


def test_each_wait_is_documented_with_its_limit():
    listed = documented()
    assert len(listed) == len(set(listed))
    assert sorted(waits() - set(listed)) == [] and sorted(set(listed) - waits()) == []


@pytest.mark.parametrize("text", ["_WAIT_S = 3", "_A_S, _B_S = 1.5, 2", "import anyio\nanyio.sleep(0.25)",
                                  "import x\nx.get(timeout=4)"])  # fmt: skip
def test_a_wait_is_found(text):
    tree = ast.parse(text)
    assert [*names_of(tree), *literals_of(tree)]
