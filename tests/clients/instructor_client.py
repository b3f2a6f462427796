"""instructor: structured output by a named tool, by JSON and by a JSON schema. Prints JSON."""

import json
import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel

url, prompt = sys.argv[1:]


class SetLight(BaseModel):
    """Switches the light."""

    on: bool
    room: Literal["kitchen", "hall"]


found = []
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0), mode=mode)
    answer = client.chat.completions.create(
        model="smollm2", temperature=0, max_tokens=128, max_retries=0, response_model=SetLight,
        messages=[{"role": "user", "content": prompt}],
    )  # fmt: skip
    found.append(answer.model_dump())
print(json.dumps({"structured": found[0], "by_schema": found[1]}))
