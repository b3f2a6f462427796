"""`/tokenize` and `/detokenize`, as vLLM has them: what the model makes of a text, without running it."""

from __future__ import annotations

from typing import Any

from kvferry_gateway.body import parse
from kvferry_gateway.errors import model_not_found
from kvferry_gateway.openai import DetokenizeRequest, TokenizeRequest
from kvferry_gateway.prompt import Conversation, Prompter


class TokenService:
    """One model's."""

    def __init__(self, prompter: Prompter, model_name: str) -> None:
        self._prompter = prompter
        self._model_name = model_name

    async def tokenize(self, body: bytes, max_model_len: int) -> dict[str, Any]:
        """Raises `ApiError` 400 or 404."""
        request = parse(TokenizeRequest, body)
        self._check_model(request.model)
        if request.messages is not None:
            conversation = Conversation(
                request.messages,
                request.add_generation_prompt,
                request.continue_final_message,
                request.chat_template_kwargs,
                bool(request.add_special_tokens),
            )
            tokens = await self._prompter.chat(conversation)
        else:
            add = True if request.add_special_tokens is None else request.add_special_tokens
            tokens = await self._prompter.text(request.prompt or "", add)
        token_ids = tokens.tolist()
        names = None
        if request.return_token_strs:
            backend = self._prompter.tokenizer.backend
            names = [backend.id_to_token(token_id) for token_id in token_ids]
        return {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": names}

    def detokenize(self, body: bytes) -> dict[str, Any]:
        """Special tokens are shown. Raises `ApiError` 400 or 404."""
        request = parse(DetokenizeRequest, body)
        self._check_model(request.model)
        return {"prompt": self._prompter.tokenizer.decode(request.tokens, skip_special_tokens=False)}

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._model_name:
            raise model_not_found(model)
