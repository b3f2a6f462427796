"""What a worker says that it holds (`/debug/blocks`), and what of it a worker at rest should not have."""

from __future__ import annotations

from typing import Any

Books = dict[str, Any]  # a document of /debug/blocks
Row = dict[str, Any]  # of /v1/cluster


def violations(books: Books) -> list[str]:
    """In words, what a worker at rest should not have."""
    counts, slots = books["counts"], books["slots"]
    found = [
        *(
            f"{count} blocks are {state}"
            for state, count in counts.items()
            if count and state not in ("free", "cached")
        ),
        *(f"{count} slots are {state}" for state, count in slots.items() if count and state != "free"),
        *(f"attempt {row['attempt']} holds {row['num_blocks']} blocks" for row in books["holdings"]),
    ]
    if (idle := counts["free"] + counts["cached"]) != books["num_blocks"]:
        found.append(f"{idle} of {books['num_blocks']} blocks are free or cached")
    found += [f"{books[kind]} {kind} are left" for kind in ("sequences", "streams") if books[kind]]
    return found
