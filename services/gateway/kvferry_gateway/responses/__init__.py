"""`/v1/responses`: another form of a chat, for text and tools. Nothing is stored."""
