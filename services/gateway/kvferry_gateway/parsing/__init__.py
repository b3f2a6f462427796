"""What a model's text means: answer, reasoning, tool calls. Pure: text in, parts out, however it is cut into pieces."""
