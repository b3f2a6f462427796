"""The data plane: KV frames into posted receives, and ordered flow messages. UCX, TCP, in-memory."""
