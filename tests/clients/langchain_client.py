"""LangChain's `ChatOpenAI`: a text, streamed and not, a demanded call, and structured output. Prints JSON."""

import json
import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

url, prompt = sys.argv[1:]


class SetLight(BaseModel):
    """Switches the light."""

    model_config = ConfigDict(extra="forbid")  # a small model would go on with properties of its own
    on: bool
    room: Literal["kitchen", "hall"]


model = ChatOpenAI(model="smollm2", base_url=f"{url}/v1", api_key="unused", temperature=0, max_tokens=48, max_retries=0)
patient = model.model_copy(update={"max_tokens": 128})  # for the whitespace between them, too
call = patient.bind_tools([SetLight], tool_choice="required", parallel_tool_calls=False).invoke(prompt).tool_calls[0]
shown = {
    "text": model.invoke(prompt).content,
    "streamed": "".join(str(chunk.content) for chunk in model.stream(prompt)),
    "call": [call["name"], call["args"]],
    "structured": patient.with_structured_output(SetLight).invoke(prompt).model_dump(),
}
print(json.dumps(shown))
