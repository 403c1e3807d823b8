"""Models behind a provider's API. pydantic-ai translates; tools are never run by it, and nothing is retried by it.

One call is one turn. What goes wrong is sorted into what may pass (asked again, with back-off) and what
will not; see :mod:`retry`. A key is given to the client of its provider and to nothing else.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio

from luminaguard.actions.tools import ToolSpec
from luminaguard.effects.text import visible
from luminaguard.errors import HistoryTooLong, ModelRefused
from luminaguard.reasoning.budget import Usage
from luminaguard.reasoning.messages import Message, ToolCall, Turn, parse_arguments
from luminaguard.reasoning.model import Told
from luminaguard.reasoning.retry import Passing

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelResponse
    from pydantic_ai.models import Model as ProviderModel

    from luminaguard.reasoning.choice import Choice

__all__ = ["ProvidersModel", "open_provider"]

_REQUEST_S = 600.0
"""All of one answer, from the first byte that is sent to the last that comes."""
_SILENCE_S = 120.0
"""Between two pieces of it."""
_MOST_TEXT = 4 << 20
_MOST_CALLS = 64
_ANTHROPICS_LIMIT = 16_000
"""Tokens of one answer; this API wants to be told, and what asks for more is cut."""
_MAY_PASS = frozenset({408, 409, 425, 429})


class ProvidersModel:
    """One model of a provider; made by :func:`open_provider`."""

    def __init__(
        self, name: str, model: ProviderModel, key: str, *, local: bool, most_tokens: int | None = None
    ) -> None:
        self.name = name
        self._model = model
        self._key = key
        self._local = local
        self._settings = {"max_tokens": most_tokens} if most_tokens else {}

    async def turn(
        self, instructions: str, history: Sequence[Message], tools: Sequence[ToolSpec], told: Told = lambda _: None
    ) -> Turn:
        """Answer once; raises Passing for what may be better the next time, ModelRefused for what will not."""
        from pydantic_ai.direct import model_request_stream
        from pydantic_ai.exceptions import AgentRunError, UserError
        from pydantic_ai.models import ModelRequestParameters
        from pydantic_ai.tools import ToolDefinition

        parameters = ModelRequestParameters(function_tools=[
            ToolDefinition(name=tool.name, description=tool.description, parameters_json_schema=dict(tool.parameters))
            for tool in tools
        ])  # fmt: skip
        try:
            with anyio.fail_after(_REQUEST_S):
                async with model_request_stream(
                    self._model,
                    self._messages(instructions, history),
                    model_request_parameters=parameters,
                    model_settings=self._settings,  # type: ignore[arg-type]  # a part of its TypedDict
                ) as stream:
                    await self._read(stream, told)
                    response = stream.get()
        except (Passing, ModelRefused):
            raise
        except TimeoutError as error:
            raise Passing(f"it did not answer within {_REQUEST_S:.0f} s") from error
        except (AgentRunError, UserError) as error:
            raise self._sorted(error) from error
        except (UnicodeError, TypeError, RecursionError) as error:  # while it was written, not while it was read
            raise ModelRefused(
                f"{self.name} cannot be asked: {self._without_key(str(error))[:300]}", hint="Cancel the task."
            ) from error
        except Exception as error:  # whatever a client of a provider raises, it is about this answer alone
            raise Passing(f"its answer broke off: {self._without_key(f'{type(error).__name__}: {error}')}") from error
        return self._turn(response)

    async def _read(self, stream: Any, told: Told) -> None:
        """Take the answer as it comes, but not for ever and not without end."""
        from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta

        size = 0
        events = stream.__aiter__()
        while True:
            try:
                with anyio.fail_after(_SILENCE_S):
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise Passing(f"nothing came for {_SILENCE_S:.0f} s") from error
            match event:
                case (
                    PartStartEvent(part=TextPart(content=text))
                    | PartDeltaEvent(delta=TextPartDelta(content_delta=text))
                ):
                    told(text)
            size += len(repr(event)) if not isinstance(event, PartDeltaEvent) else len(repr(event.delta))
            if size > 4 * _MOST_TEXT:
                raise ModelRefused(
                    f"{self.name} answered with more than {_MOST_TEXT >> 20} MiB.", hint="Ask for less at a time."
                )

    def _messages(self, instructions: str, history: Sequence[Message]) -> list[ModelMessage]:
        from pydantic_ai.messages import (
            ModelMessagesTypeAdapter,
            ModelRequest,
            ModelResponse,
            TextPart,
            ToolCallPart,
            ToolReturnPart,
            UserPromptPart,
        )

        found: list[ModelMessage] = []
        for message in history:
            if message.role == "assistant":
                whole = message.opaque.get(self.name)
                if whole is not None and not any(call.malformed for call in message.calls):
                    with suppress(ValueError):
                        found += ModelMessagesTypeAdapter.validate_python([whole])
                        continue
                parts: list[Any] = [TextPart(_text(message.text))] if message.text else []
                parts += [ToolCallPart(_text(call.name), _sent(call), _text(call.id)) for call in message.calls]
                found.append(ModelResponse(parts=parts or [TextPart("…")]))
                continue
            part = (UserPromptPart(_text(message.text)) if message.role == "user"
                    else ToolReturnPart(_text(message.tool), _text(message.text), _text(message.call_id)))  # fmt: skip
            if found and isinstance(found[-1], ModelRequest):
                found[-1].parts = [*found[-1].parts, part]
            else:
                found.append(ModelRequest(parts=[part], instructions=instructions))
        return found

    def _turn(self, response: ModelResponse) -> Turn:
        from pydantic_ai.messages import ModelMessagesTypeAdapter, TextPart, ToolCallPart

        if response.finish_reason == "content_filter":
            raise ModelRefused(f"{self.name} refuses to answer this.", hint="Ask otherwise.")
        text = "".join(part.content for part in response.parts if isinstance(part, TextPart))
        if response.finish_reason == "length" and not any(isinstance(part, ToolCallPart) for part in response.parts):
            raise ModelRefused(
                f"The answer of {self.name} was cut at its limit of tokens.", hint="Resume with another --model."
            )
        calls = []
        for number, part in enumerate(part for part in response.parts if isinstance(part, ToolCallPart)):
            raw = part.args if isinstance(part.args, str) else json.dumps(part.args or {})
            arguments, wrong = parse_arguments(raw)
            calls.append(ToolCall(part.tool_call_id or f"call-{number}", str(part.tool_name)[:128], arguments,
                                  malformed=wrong, raw=raw[:2000] if wrong else ""))  # fmt: skip
        if not text.strip() and not calls:
            raise Passing("it answered with nothing")
        if len(calls) > _MOST_CALLS:
            raise ModelRefused(f"{self.name} made {len(calls)} tool calls at once.", hint="Nothing of them was done.")
        usage = Usage(1, response.usage.input_tokens, response.usage.output_tokens, self._price(response), len(calls))
        whole = ModelMessagesTypeAdapter.dump_python([response], mode="json")[0]
        opaque = {self.name: whole} if _worth_keeping(response) else {}
        return Turn(Message("assistant", text, tuple(calls), opaque=opaque), usage, self.name)

    def _price(self, response: ModelResponse) -> float | None:
        if self._local:
            return 0.0
        try:
            return float(response.cost().total_price)
        except (LookupError, ValueError, AssertionError):
            return None

    def _sorted(self, error: Exception) -> Exception:
        from pydantic_ai.exceptions import (
            ContentFilterError,
            ModelAPIError,
            ModelConnectionError,
            ModelContextWindowExceededError,
            ModelHTTPError,
            UnexpectedModelBehavior,
        )

        words = self._without_key(str(error))[:500]
        if isinstance(error, ModelContextWindowExceededError):
            return HistoryTooLong(f"{self.name}: the history is too long for it.", hint="Resume with another --model.")
        if isinstance(error, ContentFilterError):
            return ModelRefused(f"{self.name} refuses to answer this: {words}", hint="Ask otherwise.")
        if isinstance(error, ModelHTTPError):
            status = error.status_code
            if status in _MAY_PASS or status >= 500:
                after_s = _after((error.headers or {}).get("retry-after"))
                return Passing(f"HTTP status {status}: {words}", after_s)
            hint = {401: "Check the key.", 403: "Check the key and what it may do.",
                    404: "Check the name of the model."}.get(status, "See what it says.")  # fmt: skip
            return ModelRefused(f"{self.name} refuses (HTTP status {status}): {words}", hint=hint)
        if isinstance(error, ModelConnectionError | UnexpectedModelBehavior | ModelAPIError):
            return Passing(words)
        return ModelRefused(f"{self.name} cannot be asked: {words}", hint="Check the model and its settings.")

    def _without_key(self, text: str) -> str:
        return visible(text.replace(self._key, "(the key)") if self._key else text)


def _sent(call: ToolCall) -> dict[str, Any]:
    """The arguments as they are said again; what was no JSON cannot be."""
    return {"unreadable": _text(call.raw)} if call.malformed else dict(call.arguments)


def _text(text: str) -> str:
    """A text that can be sent: halves of characters, which nobody takes, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _worth_keeping(response: ModelResponse) -> bool:
    """Whether there is more in an answer than text and calls: thoughts that the provider signed."""
    return any(part.part_kind not in {"text", "tool-call"} for part in response.parts)


def _after(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None  # a date: the usual back-off does


@asynccontextmanager
async def open_provider(choice: Choice, key: str) -> AsyncIterator[ProvidersModel]:
    """A model of a provider, whose connections end with this context."""
    url = choice.url or None
    match choice.provider:
        case "openai" | "ollama":
            from openai import AsyncOpenAI
            from pydantic_ai.models.openai import OpenAIChatModel
            from pydantic_ai.providers.openai import OpenAIProvider

            client = AsyncOpenAI(api_key=key or "none", base_url=url, max_retries=0, timeout=_REQUEST_S)
            async with client:
                model: Any = OpenAIChatModel(choice.name, provider=OpenAIProvider(openai_client=client))
                yield ProvidersModel(str(choice), model, key, local=choice.is_local)
        case "anthropic":
            from anthropic import AsyncAnthropic
            from pydantic_ai.models.anthropic import AnthropicModel
            from pydantic_ai.providers.anthropic import AnthropicProvider

            async with AsyncAnthropic(api_key=key, base_url=url, max_retries=0, timeout=_REQUEST_S) as anthropic:
                model = AnthropicModel(choice.name, provider=AnthropicProvider(anthropic_client=anthropic))
                yield ProvidersModel(str(choice), model, key, local=choice.is_local, most_tokens=_ANTHROPICS_LIMIT)
        case _:
            from httpx2 import AsyncClient
            from pydantic_ai.models.google import GoogleModel
            from pydantic_ai.providers.google import GoogleProvider

            # A client of ours: the provider's own is shared, and outlives the context with its connections.
            async with AsyncClient(timeout=_REQUEST_S) as google:
                provider = GoogleProvider(api_key=key, base_url=url, http_client=google)
                yield ProvidersModel(str(choice), GoogleModel(choice.name, provider=provider), key,
                                     local=choice.is_local)  # fmt: skip
