"""Where a request goes, and why: what workers have told, predicted into a pair of them. Pure."""
