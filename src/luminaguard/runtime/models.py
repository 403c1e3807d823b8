"""The models that a person chose: checked at once, loaded and opened when they are asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from luminaguard.errors import ModelUnavailable
from luminaguard.reasoning.model import Model

__all__ = ["check_models", "open_models"]

_NOTHING_WORKS = (
    "nothing yet: set ANTHROPIC_API_KEY, OPENAI_API_KEY or GOOGLE_API_KEY, or start Ollama or llama.cpp's server"
)


def check_models(models: str) -> None:
    """Check, without loading their libraries, that models could be opened.

    Raises:
        SettingsError: it names no model, or a script that cannot be read.
        ModelUnavailable: none was chosen, or a key is missing.
    """
    from luminaguard.reasoning.choice import find_key, parse_choices, what_would_work
    from luminaguard.reasoning.script import ScriptModel

    if not models:
        works = "; ".join(what_would_work()) or _NOTHING_WORKS
        raise ModelUnavailable(
            "No language model is chosen.",
            hint=f"Give --model PROVIDER:NAME, or set model in luminaguard.toml. On this machine: {works}.",
        )
    for choice in parse_choices(models):
        if choice.provider == "script":
            ScriptModel.load(Path(choice.name))
        else:
            find_key(choice)


@asynccontextmanager
async def open_models(models: str, note: Callable[[str], None] = lambda _: None) -> AsyncIterator[Model]:
    """The models that a person chose, in their order; their connections end with this context.

    Args:
        models: as it was written; see :mod:`luminaguard.reasoning.choice`.
        note: told when another one is asked.

    Raises:
        SettingsError: it names none, or a script that cannot be read.
        ModelUnavailable: a key is missing.
    """
    from luminaguard.reasoning.choice import find_key, parse_choices
    from luminaguard.reasoning.retry import Persistent
    from luminaguard.reasoning.script import ScriptModel

    async with AsyncExitStack() as stack:
        opened: list[Model] = []
        for choice in parse_choices(models):
            if choice.provider == "script":
                opened.append(await anyio.to_thread.run_sync(ScriptModel.load, Path(choice.name)))
                continue
            from luminaguard.reasoning.providers import open_provider

            key = await anyio.to_thread.run_sync(partial(find_key, choice))
            opened.append(await stack.enter_async_context(open_provider(choice, key)))
        yield Persistent(opened, note=note)
