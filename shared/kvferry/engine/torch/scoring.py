"""How likely known tokens are, by torch, on the device where the logits lie."""

from __future__ import annotations

import numpy as np
import torch

from kvferry.wire.fields import TokenArray
from kvferry.wire.logprobs import PromptLogprobs


def score(logits: torch.Tensor, targets: TokenArray, num_top: int, start: int) -> PromptLogprobs:
    """Of `targets` [num_rows], at positions from `start` on, by raw logits [num_rows, vocab]; NaN counts as -inf."""
    wide = torch.nan_to_num(logits.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    norm = wide.logsumexp(-1, keepdim=True)
    own = wide.gather(1, torch.from_numpy(targets.astype(np.int64)).to(wide.device)[:, None])
    top = _best(wide, num_top)
    logprobs = torch.cat((own, wide.gather(1, top)), 1) - norm
    return PromptLogprobs(
        start,
        (wide >= own).sum(-1).cpu().numpy().astype(np.uint32),
        top.cpu().numpy().astype(np.uint32),
        logprobs.cpu().numpy(),
    )


def _best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids [num_rows, count] by (logit descending, id ascending): `topk` alone leaves the order of equals open."""
    # An fp32's bits order as its values do, once those of negative ones are turned round; -0.0 is made 0.0 before.
    bits = (logits + 0.0).view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    vocab_size = logits.shape[1]
    ids = torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    keys = (rising << 32) + ids
    return vocab_size - 1 - (keys.topk(count).values & 0xFFFFFFFF)
