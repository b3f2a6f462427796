"""What changes a row's logits before the draw: banned tokens, biases and penalties, in vLLM's order.

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
    return bool(draw.banned or draw.logit_bias or draw.sampling.penalised)


def adjust(logits: npt.NDArray[np.float32], draw: Draw) -> npt.NDArray[np.float32]:
    """A changed copy of a row's logits [vocab]."""
    logits = logits.copy()
    logits[list(draw.banned)] = -np.inf
    for token, bias in draw.logit_bias:  # one after the other: a token may stand twice
        logits[token] += np.float32(bias)
    if draw.sampling.penalised:
        _penalise(logits, draw)
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
