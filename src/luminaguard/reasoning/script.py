"""A model that plays a file: for demonstrations, tests and replays. It thinks nothing, and says so.

    turns:
      - say: I look first.
        calls:
          - list_files: {}
          - shell: {command: "make test"}
      - say: Done.

Each turn is the next one of the file; after its last, the script ends the task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luminaguard.actions.tools import ToolSpec
from luminaguard.errors import SettingsError
from luminaguard.reasoning.budget import Usage
from luminaguard.reasoning.messages import Message, ToolCall, Turn
from luminaguard.reasoning.model import Told

__all__ = ["ScriptModel"]

_MAX_FILE = 4 << 20


class ScriptModel:
    """Plays the turns of a script.

    Args:
        name: for records.
        turns: as they stand in the file, or as a replay has them.
    """

    def __init__(self, name: str, turns: Sequence[tuple[str, Sequence[tuple[str, dict[str, Any]]]]]) -> None:
        self.name = name
        self._turns = tuple(turns)

    @classmethod
    def load(cls, path: Path) -> ScriptModel:
        """Read a script.

        Raises:
            SettingsError: it cannot be read, or is none; it says where.
        """
        import yaml

        try:
            with path.open("rb") as file:
                # What JSON does not have (dates, sets, loops) is no argument either.
                raw = json.loads(json.dumps(yaml.safe_load(file.read(_MAX_FILE))))
            turns = [(str(turn.get("say", "")), [_call(call) for call in turn.get("calls", ())])
                     for turn in raw["turns"]]  # fmt: skip
        except OSError as error:
            raise SettingsError(
                f"The script {str(path)!a} cannot be read: {error.strerror}.", hint="Check the path after script:."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError,
                RecursionError) as error:  # fmt: skip
            raise SettingsError(
                f"{str(path)!a} is no script: {error}.",
                hint="It is YAML: 'turns:', a list of 'say:' and 'calls:', each call 'TOOL: {ARGUMENT: VALUE}'.",
            ) from error
        return cls(f"script:{path}", turns)

    async def turn(
        self, instructions: str, history: Sequence[Message], tools: Sequence[ToolSpec], told: Told = lambda _: None
    ) -> Turn:
        """The next turn of the file."""
        del instructions, tools
        number = sum(message.role == "assistant" for message in history)
        say, calls = self._turns[number] if number < len(self._turns) else ("The script has ended.", ())
        told(say)
        made = tuple(ToolCall(f"s{number}-{at}", name, arguments) for at, (name, arguments) in enumerate(calls))
        usage = Usage(requests=1, tool_calls=len(made))
        return Turn(Message("assistant", say, made), usage, self.name)


def _call(raw: Any) -> tuple[str, dict[str, Any]]:
    (name, arguments), *more = raw.items()
    if more or not isinstance(arguments or {}, dict):
        raise ValueError(f"{raw!r:.80} is no call")
    return str(name), dict(arguments or {})
