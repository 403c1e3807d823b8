"""One turn of a language model: messages in, text and tool calls out, within a budget."""

from luminaguard.reasoning.budget import Budget, Usage
from luminaguard.reasoning.messages import Message, ToolCall, Turn
from luminaguard.reasoning.model import Model

__all__ = ["Budget", "Message", "Model", "ToolCall", "Turn", "Usage"]
