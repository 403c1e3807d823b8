"""The port to language models: one call is one turn. Who is behind it runs no tools and keeps no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from luminaguard.actions.tools import ToolSpec
from luminaguard.reasoning.messages import Message, Turn

__all__ = ["Model", "Told"]

Told = Callable[[str], None]
"""Gets pieces of the answer's text as they come, and is told of an answer that begins anew with an empty one."""


class Model(Protocol):
    """A language model."""

    @property
    def name(self) -> str:
        """As the person wrote it: ``anthropic:claude-...``, ``script:FILE``."""

    async def turn(
        self, instructions: str, history: Sequence[Message], tools: Sequence[ToolSpec], told: Told = lambda _: None
    ) -> Turn:
        """Answer a history.

        Args:
            instructions: the system's, which no message can change.
            history: all that was said, oldest first; it ends with a user's or a tool's message.
            tools: what may be called.
            told: gets the text as it comes.

        Raises:
            ModelUnavailable: it cannot be reached, or refuses for a while, after retries.
            ModelRefused: it will not answer this: a wrong key, an unknown model, a history that is too long.
        """
