"""Text of about so many tokens, for any tokenizer: short English words are one token each in nearly all of them.

How many tokens a server counted is in its answer's `usage`, and reported.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from kvferry_local.bench.workload import Planned

BLOCK_TOKENS: Final = 512  # of a trace's named block
WORDS: Final = (  # noqa: SIM905 - easier to read than a list of strings
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city name team minute idea body back parent face "
    "level office door health person art war history party result change morning reason research girl guy moment air "
    "teacher force education"
).split()


def prompt(request: Planned, number: int, seed: int) -> str:
    """Two requests share as much of their beginning as their blocks' names do, and nothing where they have none."""
    if not request.blocks:
        return _words((seed, 0, number), request.prompt_tokens)
    # Lengths may have been scaled: a block keeps its share of the prompt.
    per_block = max(1, min(BLOCK_TOKENS, request.prompt_tokens // len(request.blocks)))
    blocks = [_words((seed, 1, name), per_block) for name in request.blocks]
    rest = request.prompt_tokens - per_block * len(blocks)
    return " ".join([*blocks, *([_words((seed, 0, number), rest)] if rest > 0 else [])])


def _words(seed: tuple[int, ...], count: int) -> str:
    return " ".join(WORDS[index] for index in np.random.default_rng(seed).integers(len(WORDS), size=count))
