"""The edge of HTTP: connections, keys, limits; nothing of what is asked or answered."""
