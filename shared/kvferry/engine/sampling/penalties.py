"""What changes a row's logits before the draw: tokens that may not be drawn, biases and penalties, in vLLM's order.

Penalties, with c the number of times that a token was generated so far:

    repetition   a token of prompt or text: logit / r if the logit is positive, else logit x r
    frequency    logit - f x c
    presence     logit - p if c > 0
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvferry.schedule.step import Draw


def adjusts(draw: Draw) -> bool:
    return bool(draw.mask is not None or draw.banned or draw.logit_bias or draw.sampling.penalised)


def adjust(logits: npt.NDArray[np.float32], draw: Draw) -> npt.NDArray[np.float32]:
    """A changed copy of a row's logits [vocab]."""
    logits = logits.copy()
    words = draw.allowed()
    if words is None:
        logits[list(draw.banned)] = -np.inf
    else:
        allowed = np.unpackbits(words.view(np.uint8), count=len(logits), bitorder="little").view(np.bool_)
        logits[~allowed] = -np.inf  # bans are among them
    for token, bias in draw.logit_bias:  # one after the other: a token may stand twice
        logits[token] += np.float32(bias)
    if draw.sampling.penalised:
        _penalise(logits, draw)
    # A broken row in which nothing is left must not give a token that may not be drawn.
    if words is not None and not (logits > -np.inf).any():
        logits[allowed] = 0
    return logits


def _penalise(logits: npt.NDArray[np.float32], draw: Draw) -> None:
    sampling = draw.sampling
    repetition = np.float32(sampling.repetition_penalty)
    met = np.unique(draw.tokens)
    values = logits[met]
    with np.errstate(over="ignore"):  # an infinite logit is one that the sampler knows to handle
        logits[met] = np.where(values > 0, values / repetition, values * repetition)
    generated, counts = np.unique(draw.tokens[draw.num_prompt :], return_counts=True)
    logits[generated] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
    logits[generated] -= np.float32(sampling.presence_penalty)
