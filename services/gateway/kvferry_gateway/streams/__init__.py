"""The token path: from the batches of workers to the text of each choice."""
