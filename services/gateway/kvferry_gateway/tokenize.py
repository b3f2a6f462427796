"""`/tokenize` and `/detokenize`, as vLLM has them: what the model makes of a text, without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, model_validator

from kvferry_gateway.body import parse
from kvferry_gateway.errors import bad_request
from kvferry_gateway.models import Models, ServedModel
from kvferry_gateway.requests.conversation import Conversation
from kvferry_gateway.requests.messages import Label, Messages
from kvferry_gateway.requests.openai import MAX_TEMPLATE_KWARGS, TokenId, check_conversation_end
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.tools import Tools


class TokenizeRequest(RequestModel):
    """A text or a conversation, as vLLM's `/tokenize` takes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[Label, Any], Field(max_length=MAX_TEMPLATE_KWARGS)] | None = None
    tools: Tools = Field(default_factory=list)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("Exactly one of 'prompt' and 'messages' is needed.", "prompt")
        for place, message in enumerate(self.messages or ()):
            message.check(f"messages[{place}]")
        check_conversation_end(self.add_generation_prompt, self.continue_final_message)
        return self


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[TokenId]


class TokenService:
    """One gateway's, for all its models."""

    def __init__(self, models: Models, max_model_len: Callable[[ServedModel], int]) -> None:
        self._models = models
        self._max_model_len = max_model_len

    async def tokenize(self, body: bytes) -> dict[str, Any]:
        """Raises `ApiError` 400 or 404."""
        request = parse(TokenizeRequest, body)
        model = self._models.asked_for(request.model)
        prompter = model.prompter
        if request.messages is not None:
            conversation = Conversation(
                request.messages,
                request.add_generation_prompt,
                request.continue_final_message,
                request.chat_template_kwargs,
                bool(request.add_special_tokens),
                request.tools,
            )
            tokens = (await prompter.chat(conversation)).tokens
        else:
            add = True if request.add_special_tokens is None else request.add_special_tokens
            tokens = await prompter.text(request.prompt or "", add)
        token_ids = tokens.tolist()
        names = None
        if request.return_token_strs:
            backend = prompter.tokenizer.backend
            names = [backend.id_to_token(token_id) for token_id in token_ids]
        max_model_len = self._max_model_len(model)
        return {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": names}

    def detokenize(self, body: bytes) -> dict[str, Any]:
        """Special tokens are shown. Raises `ApiError` 400 or 404."""
        request = parse(DetokenizeRequest, body)
        prompter = self._models.asked_for(request.model).prompter
        return {"prompt": prompter.tokenizer.decode(request.tokens, skip_special_tokens=False)}
