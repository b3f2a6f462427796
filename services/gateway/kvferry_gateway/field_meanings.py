"""What the fields of requests mean, in a line each: for the OpenAPI document and the reference page."""

from __future__ import annotations

from typing import Final

# By field; a model's own line stands under `Model.field`.
MEANINGS: Final[dict[str, str]] = {
    "add_generation_prompt": "End the prompt with the beginning of the assistant's turn.",
    "add_special_tokens": "Put the tokenizer's own special tokens around the prompt; by default for bare prompts only.",
    "bad_words": "Words of one token that are never drawn.",
    "best_of": "Outputs to generate for each prompt, of which the `n` likeliest per token are told; not streamed.",
    "chat_template_kwargs": "Variables for the model's chat template, such as `enable_thinking`.",
    "continue_final_message": "Go on with the last message; `add_generation_prompt` must be false.",
    "echo": "Begin each answer with its prompt; with `logprobs` they are told of its tokens, too.",
    "frequency_penalty": "Taken from a token's logit for each time that it was generated.",
    "ignore_eos": "Generate up to the limit, whatever the model says about its end.",
    "include": "What else to tell: `message.output_text.logprobs`.",
    "include_stop_str_in_output": "Show the stop string that ended the text.",
    "input": "A text, or the items of a conversation: messages, calls, their outputs, reasoning.",
    "instructions": "A system message before the input.",
    "logit_bias": "Token id to what is added to its logit.",
    "logprobs": "Tell the log-probability of each token.",
    "CompletionRequest.logprobs": "Tell the log-probability of each token and of so many best ones beside it.",
    "max_completion_tokens": "Most tokens to generate; by default what the context leaves.",
    "max_output_tokens": "Most tokens to generate; by default what the context leaves.",
    "max_tokens": "Most tokens to generate; by default what the context leaves for chats, 16 for completions. 0 with "
    "`echo` or `prompt_logprobs`: none.",
    "messages": "The conversation.",
    "metadata": "Labels; they change nothing.",
    "min_p": "Only tokens at least so likely as this share of the likeliest one.",
    "min_tokens": "No end before so many tokens.",
    "model": "Name of the model, as `/v1/models` tells it; needed where there are several.",
    "n": "Answers to each prompt.",
    "parallel_tool_calls": "More than one call in an answer.",
    "presence_penalty": "Taken from a token's logit if it was generated before.",
    "previous_response_id": "Refused: nothing is stored.",
    "priority": "Lower goes first, and keeps its memory when it is short; below 0 is urgent, above 0 background.",
    "prompt": "A text, token ids, or a list of either.",
    "prompt_logprobs": "Tell the log-probability of each token of the prompt and of so many best ones beside it; not "
    "streamed.",
    "prompt_cache_key": "A label; the prefix cache needs none.",
    "repetition_penalty": "Divides the positive, multiplies the negative logit of each token of prompt and answer.",
    "response_format": "`json_object`, or `json_schema` with a schema that the text will follow.",
    "return_token_ids": "Tell the ids of prompt and generated tokens.",
    "return_token_strs": "Tell each token's name, too.",
    "safety_identifier": "A label; it changes nothing.",
    "seed": "The same seed draws the same tokens.",
    "skip_special_tokens": "Special tokens have no text.",
    "stop": "Texts that end the answer.",
    "stop_token_ids": "Tokens that end the answer.",
    "store": "Only false: nothing is stored, also where it is not given.",
    "stream": "Tell the answer as server-sent events, as it comes.",
    "stream_options": "`include_usage`: token counts in the last event; `continuous_usage_stats`: in each one.",
    "ResponsesRequest.stream_options": "`include_obfuscation` is taken; events are not padded.",
    "structured_outputs": "What the text must be, as vLLM spells it: one of `json`, `regex`, `choice`, `grammar`, "
    "`structural_tag`.",
    "temperature": "Divides the logits; 0 takes the likeliest token.",
    "text": "The form of the text: `format`.",
    "tokens": "Token ids.",
    "tool_choice": "`none`, `auto`, `required`, or the one tool to call. A demanded call follows its schema.",
    "tools": "Functions that the model may call.",
    "top_k": "Only the so many likeliest tokens; 0 and -1: all.",
    "top_logprobs": "So many best tokens beside each one; needs log-probabilities to be asked for.",
    "top_p": "Only the likeliest tokens that make up this share.",
    "truncate_prompt_tokens": "Only the last so many tokens of the prompt; -1: what leaves room for the output.",
    "user": "A label; it changes nothing.",
}


def meaning_of(model: str, field: str) -> str:
    """Raises `KeyError` for a field without one."""
    return MEANINGS.get(f"{model}.{field}") or MEANINGS[field]
