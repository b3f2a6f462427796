"""From logits to tokens: penalties, the draw by counter-based randomness, logprobs."""
