"""A conversation as its model reads it: messages and tools through the chat template, to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvferry.text.chat_template import ChatTemplate
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.fields import TokenArray
from kvferry_gateway.errors import bad_request
from kvferry_gateway.parsing.forms import Thoughts, carries_tools, thoughts_of
from kvferry_gateway.requests.messages import ChatMessage
from kvferry_gateway.requests.tool_prompt import with_tools_spelled
from kvferry_gateway.requests.tools import Tool

# Template variables that are not the client's to set.
_RESERVED: Final = frozenset({"self", "messages", "add_generation_prompt", "tools", "documents"})
CHARS_PER_TOOL: Final = 512  # that a tool is taken for, when it is guessed how long a prompt will be


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template is given."""

    messages: Sequence[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = False
    tools: Sequence[Tool] = ()

    @property
    def num_chars(self) -> int:
        """About, before the template's own."""
        return sum(message.num_chars for message in self.messages) + CHARS_PER_TOOL * len(self.tools)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation's prompt, and where an answer to it begins if the model thinks."""

    tokens: TokenArray  # u32 [num_tokens]
    thoughts: Thoughts


class ConversationReader:
    """One model's template and tokenizer. Blocking."""

    def __init__(self, model: ModelDir, tokenizer: Tokenizer) -> None:
        """Raises `CheckpointError`."""
        source = model.chat_template or ""
        self._tokenizer = tokenizer
        self._template = ChatTemplate.of(model)
        self._knows_developer = "developer" in source
        self._carries_tools = carries_tools(source)

    def read(self, conversation: Conversation) -> Rendered:
        """Raises `ApiError` 400, `ChatTemplateError`, `InvalidTextError`."""
        if self._template is None:
            raise bad_request("This model has no chat template: use /v1/completions.", "messages")
        kwargs = conversation.kwargs or {}
        if reserved := _RESERVED & kwargs.keys():
            param = f"chat_template_kwargs.{min(reserved)}"
            raise bad_request(f"'{param}' is not for requests to set.", param, "invalid_value")
        messages = [self._message(message) for message in conversation.messages]
        tools = [tool.for_template() for tool in conversation.tools]
        if self._carries_tools:
            # Without tools it is None: templates ask for that.
            rendered = self._template.render(
                messages, conversation.add_generation_prompt, **kwargs, tools=tools or None
            )
        else:
            messages = with_tools_spelled(messages, tools)
            rendered = self._template.render(messages, conversation.add_generation_prompt, **kwargs)
        if conversation.continue_final_message:
            rendered = _cut_after(rendered, messages[-1]["content"])
        tokens = self._tokenizer.encode(rendered, conversation.add_special_tokens)
        return Rendered(tokens, thoughts_of(rendered))

    def _message(self, message: ChatMessage) -> dict[str, Any]:
        """`developer` is OpenAI's newer name of `system`, which few templates know."""
        made = message.for_template()
        if made["role"] == "developer" and not self._knows_developer:
            made["role"] = "system"
        return made


def _cut_after(rendered: str, content: str) -> str:
    """The rendered conversation up to the end of its last message, so that the model goes on with it."""
    place = rendered.rfind(content.strip())
    if place < 0 or not content.strip():
        raise bad_request(
            "The last message can't be continued: the chat template does not show it as it is.",
            "continue_final_message",
        )
    # Its trailing white space stays where the template has kept it.
    whole = content.lstrip()
    kept = whole if rendered.startswith(whole, place) else content.strip()
    return rendered[: place + len(kept)]
