"""One choice of a request from its first placement to its last token, over all attempts."""
