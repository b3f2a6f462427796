"""Log-probabilities in OpenAI's two forms: a list of entries for chats, columns for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from kvferry.text.detokenizer import TokenTexts
from kvferry.wire.logprobs import TokenLogprobs

LOWEST: Final = -9999.0  # JSON has no infinity; OpenAI's and vLLM's stand-in


class ToldToken(NamedTuple):
    """One token of an answer that tells more than its text."""

    token: int
    text_offset: int  # characters of text before it
    logprobs: TokenLogprobs | None


def chat_logprobs(told: Sequence[ToldToken], texts: TokenTexts) -> dict[str, Any]:
    """The `logprobs` of a chat's choice or chunk."""
    entries = []
    for token, _, found in told:
        if found is not None:
            best = zip(found.top_tokens, found.top_logprobs, strict=True)
            top = [_entry(other, logprob, texts) for other, logprob in best]
            entries.append({**_entry(token, found.logprob, texts), "top_logprobs": top})
    return {"content": entries, "refusal": None}


def text_logprobs(told: Sequence[ToldToken], texts: TokenTexts) -> dict[str, Any]:
    """The `logprobs` of a completion's choice or chunk. The drawn token is among its best ones, as OpenAI has it."""
    scored = [item for item in told if item.logprobs is not None]
    names = [name_of(item.token, texts) for item in scored]
    tops = []
    for item, name in zip(scored, names, strict=True):
        found = item.logprobs
        assert found is not None
        best = zip(found.top_tokens, found.top_logprobs, strict=True)
        top = {name_of(token, texts): finite(logprob) for token, logprob in best}
        top.setdefault(name, finite(found.logprob))
        tops.append(top)
    return {
        "text_offset": [item.text_offset for item in scored],
        "token_logprobs": [finite(item.logprobs.logprob) for item in scored if item.logprobs is not None],
        "tokens": names,
        "top_logprobs": tops,
    }


def _entry(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    spelled = texts.bytes_of(token)
    return {"token": spelled.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(spelled)}


def name_of(token: int, texts: TokenTexts) -> str:
    """A token as a key: its text, or its bytes as OpenAI spells them where they are no text by themselves."""
    spelled = texts.bytes_of(token)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def finite(logprob: float) -> float:
    return max(logprob, LOWEST) if logprob == logprob else LOWEST  # NaN is not equal to itself
