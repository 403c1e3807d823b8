"""What a server asks the person at the terminal in the middle of a call (elicitation)."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mcp_types as types

    from luminaguard.mcp.session import Peer
    from luminaguard.runtime.mcp import McpServers, Opened

__all__ = ["Questions", "at_a_terminal", "understood"]

_MOST_LINE = 4096
_MOST_FIELDS = 32
_ROUNDS = 10
_YES, _NO = frozenset({"y", "yes", "true"}), frozenset({"n", "no", "false"})


def at_a_terminal() -> bool:
    """Whether somebody is there who can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


class Questions:
    """Asks for one server; what it wants to know is shown as what it is, and nothing is sent before a last look."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._rest = b""

    def peer(self) -> Peer:
        """Whom a server speaks with, if a person is here."""
        from luminaguard.mcp.session import Peer

        async def elicit(context: Any, params: types.ElicitRequestParams) -> types.ElicitResult:  # noqa: ARG001  # the SDK's
            return await self.ask(params)

        return Peer(elicitation=elicit)

    async def call(
        self, servers: McpServers, opened: Opened, tool: str, arguments: dict[str, Any]
    ) -> types.CallToolResult:  # fmt: skip
        """Call a tool whose server may ask something first, and go on with the answer.

        Raises:
            NotExecuted: it wants what nobody here can give.
            LuminaGuardError: as :meth:`McpServers.call_further`.
        """
        import mcp_types as types

        from luminaguard.errors import NotExecuted
        from luminaguard.mcp.session import More

        now, more = await opened.session.list_tools(), More()
        for _ in range(_ROUNDS):
            answer = await servers.call_further(opened, tool, arguments, more, task="", now=now)
            if isinstance(answer, types.CallToolResult):
                return answer
            responses: dict[str, Any] = {}
            for key, request in (answer.input_requests or {}).items():
                if not isinstance(request, types.ElicitRequest):
                    why = f"The server {self._server!a} wants {request.method}, which nobody here can give."
                    raise NotExecuted(why, hint="Use it through 'luminaguard gateway --server'.")
                responses[key] = await self.ask(request.params)
            more = More(responses, answer.request_state)
        why = f"The server {self._server!a} asked {_ROUNDS} times and did nothing."
        raise NotExecuted(why, hint="Ask its author.")

    async def ask(self, params: types.ElicitRequestParams) -> types.ElicitResult:
        """Ask; a person who leaves cancels."""
        import mcp_types as types

        try:
            if isinstance(params, types.ElicitRequestFormParams):
                return await self._fill_in(params)
            self._say(f"\nThe server {self._server!a} wants you to open an address: {_plain(params.message)}")
            self._say(f"  {_plain(params.url)}")
            action = "accept" if await self._agreed("did you, or will you?") else "decline"
            return types.ElicitResult(action=action)  # type: ignore[arg-type]  # one of the two
        except EOFError:
            return types.ElicitResult(action="cancel")

    async def _fill_in(self, params: types.ElicitRequestFormParams) -> types.ElicitResult:
        import mcp_types as types

        fields = params.requested_schema.get("properties")
        if not isinstance(fields, dict) or len(fields) > _MOST_FIELDS:
            return types.ElicitResult(action="decline")
        self._say(f"\nThe server {self._server!a} asks: {_plain(params.message)}")
        self._say("  (it gets what you type: no passwords, no keys; an end of file cancels)")
        required = params.requested_schema.get("required")
        content: dict[str, Any] = {}
        for name, field in fields.items():
            needed = isinstance(required, list) and name in required
            value = await self._value(str(name), field if isinstance(field, dict) else {}, needed=needed)
            if value is not None:
                content[name] = value
        for name, value in content.items():
            self._say(f"  {_plain(str(name))} = {_plain(str(value))}")
        if await self._agreed("send this?"):
            return types.ElicitResult(action="accept", content=content)
        return types.ElicitResult(action="decline")

    async def _value(self, name: str, field: dict[str, Any], *, needed: bool) -> Any:
        """One field's value; None for one that may be left out, and is."""
        about = _plain(str(field.get("description") or field.get("title") or ""))
        label = f"  {_plain(name)}{f' ({about})' if about else ''}"
        for number, (_, title) in enumerate(_choices(field), 1):
            label += f"\n    {number}: {_plain(title)}"
        default = field.get("default")
        label += f" [{_plain(str(default))}]" if default is not None else "" if needed else " [none]"
        while True:
            text = await self._line(f"{label}: ")
            if not text and (default is not None or not needed):
                return default
            value, why = understood(field, text)
            if not why:
                return value
            self._say(f"  {why}")

    async def _agreed(self, question: str) -> bool:
        return (await self._line(f"  {question} [y/N] ")).lower() in _YES

    async def _line(self, prompt: str) -> str:
        """A line that is typed; raises EOFError for none. Unlike ``input`` it can be interrupted."""
        import anyio

        sys.stderr.write(prompt)
        sys.stderr.flush()
        while b"\n" not in self._rest:
            await anyio.wait_readable(sys.stdin.fileno())
            data = os.read(sys.stdin.fileno(), _MOST_LINE)
            if not data:
                raise EOFError
            self._rest = (self._rest + data)[-(1 << 20) :]
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace").strip()

    @staticmethod
    def _say(text: str) -> None:
        sys.stderr.write(f"{text}\n")


def understood(field: dict[str, Any], text: str) -> tuple[Any, str]:
    """What a text means for a field, and why it means nothing; the schema is as simple as the protocol lets it be."""
    choices = _choices(field)
    if field.get("type") == "array":
        found = [_chosen(choices, part.strip()) for part in text.split(",") if part.strip()]
        low, high = field.get("minItems", 0), field.get("maxItems", len(choices))
        good = None not in found and low <= len(found) <= high
        return (found, "") if good else (None, f"Numbers of the list with commas between them, {low} to {high}.")
    if choices:
        chosen = _chosen(choices, text)
        return (chosen, "") if chosen is not None else (None, "A number of the list.")
    match field.get("type"):
        case "boolean":
            known = text.lower() in _YES | _NO
            return (text.lower() in _YES, "") if known else (None, "y or n.")
        case "integer" | "number" as kind:
            try:
                value = int(text) if kind == "integer" else float(text)
            except ValueError:
                return None, "A whole number." if kind == "integer" else "A number."
            low, high = field.get("minimum", value), field.get("maximum", value)
            return (value, "") if low <= value <= high else (None, f"From {low} to {high}.")
        case _:
            low, high = field.get("minLength", 0), field.get("maxLength", _MOST_LINE)
            return (text, "") if low <= len(text) <= high else (None, f"{low} to {high} characters.")


def _choices(field: dict[str, Any]) -> list[tuple[str, str]]:
    """Values and what people see for them."""
    field = field["items"] if isinstance(field.get("items"), dict) else field
    titled = field.get("oneOf") or field.get("anyOf")
    if isinstance(titled, list):
        return [(str(one["const"]), str(one.get("title", one["const"]))) for one in titled if "const" in one]
    values = field.get("enum")
    names = field.get("enumNames")
    if not isinstance(values, list):
        return []
    shown = names if isinstance(names, list) and len(names) == len(values) else values
    return [(str(value), str(name)) for value, name in zip(values, shown, strict=True)]


def _chosen(choices: list[tuple[str, str]], text: str) -> str | None:
    if text.isascii() and text.isdigit() and 1 <= int(text) <= len(choices):
        return choices[int(text) - 1][0]
    return next((value for value, name in choices if text in {value, name}), None)


def _plain(text: str) -> str:
    from luminaguard.effects.text import visible

    return visible(text)[:2000]
