"""How KV moves from a prefill worker into a decode worker: what one pull sends, and how it lands."""
