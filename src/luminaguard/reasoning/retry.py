"""Asking again, and asking another model: what may pass is waited for, what will not is not."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import anyio

from luminaguard import log
from luminaguard.actions.tools import ToolSpec
from luminaguard.errors import ModelRefused, ModelUnavailable
from luminaguard.reasoning.budget import Usage
from luminaguard.reasoning.messages import Message, Turn
from luminaguard.reasoning.model import Model, Told

__all__ = ["Passing", "Persistent"]

_ATTEMPTS = 4
_FIRST_S, _LONGEST_S = 0.5, 60.0
Sleep = Callable[[float], Awaitable[None]]


class Passing(Exception):
    """A failure that may be over the next time; ``after_s`` is what the provider asks to wait, in seconds."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.after_s = after_s


class Persistent:
    """Asks the first of several models, again after a while if need be, and then the next one.

    Args:
        models: in the order in which they are asked.
        sleep, draw: time and chance (a number from 0 to 1), for tests.
        note: told when another model is asked.
    """

    def __init__(
        self, models: Sequence[Model], sleep: Sleep = anyio.sleep, draw: Callable[[], float] = random.random,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._models = tuple(models)
        self._sleep, self._draw, self._note = sleep, draw, note

    @property
    def name(self) -> str:
        """All of them, in their order."""
        return ",".join(model.name for model in self._models)

    async def turn(
        self, instructions: str, history: Sequence[Message], tools: Sequence[ToolSpec], told: Told = lambda _: None
    ) -> Turn:
        """Answer a history.

        Raises:
            ModelUnavailable: none of the models answers, after retries.
            ModelRefused: the last of them will not answer this.
        """
        said: list[str] = []
        refused: ModelRefused | None = None
        asked = [0]
        for number, model in enumerate(self._models):
            if said:
                self._note(f"{said[-1]}; asking {model.name}")
            try:
                turn = await self._ask(model, instructions, history, tools, told, asked)
                # Who answered is asked first from here on, and who did not after all the others.
                self._models = (*self._models[number:], *self._models[:number])
                return replace(turn, usage=turn.usage + Usage(requests=asked[0] - 1))
            except Passing as error:
                said.append(f"{model.name}: {error.why}")
            except ModelRefused as error:
                said.append(error.message)
                refused = error
            told("")
        if refused is not None and len(self._models) == 1:
            refused.requests = asked[0]
            raise refused
        unavailable = ModelUnavailable(
            f"No model answered: {'; '.join(said)}",
            hint="Run the task on later with 'luminaguard tasks resume', or choose another --model.",
            kept="All finished steps were kept.",
        )
        unavailable.requests = asked[0]
        raise unavailable

    async def _ask(
        self, model: Model, instructions: str, history: Sequence[Message], tools: Sequence[ToolSpec], told: Told,
        asked: list[int],
    ) -> Turn:  # fmt: skip
        for attempt in range(1, _ATTEMPTS + 1):
            asked[0] += 1
            try:
                return await model.turn(instructions, history, tools, told)
            except Passing as error:
                wait_s = error.after_s if error.after_s is not None else self._back_off(attempt)
                log.event("model.retry", model=model.name, attempt=attempt, why=error.why, wait_s=round(wait_s, 1))
                if attempt == _ATTEMPTS or wait_s > _LONGEST_S:
                    raise
                told("")
                await self._sleep(wait_s)
        raise AssertionError("unreachable")

    def _back_off(self, attempt: int) -> float:
        """Twice as long each time, and never the same for two who failed together (full jitter)."""
        return min(_LONGEST_S, _FIRST_S * 2.0**attempt) * (0.5 + self._draw() / 2)
