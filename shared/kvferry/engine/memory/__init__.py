"""The twin of an engine: no weights, exact, and its KV tells whether it is the right one."""
