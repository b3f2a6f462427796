"""What crosses a process border: messages, their codec, subjects, the KV frame. Pure: no I/O, no torch."""
