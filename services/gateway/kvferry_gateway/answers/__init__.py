"""What clients get: the JSON around generated text, whole or as events. Pure."""
