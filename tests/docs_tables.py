"""The tables of the documents that are made from code. `python tests/docs_tables.py` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from kvferry.config import Settings, env_name, flag_name, is_secret, shown_default
from kvferry_local.settings import UpSettings

ROOT = Path(__file__).parents[1]


def settings_table(cls: type[Settings]) -> str:
    """A Markdown table of one settings class."""
    rows = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for field, spec in cls.model_fields.items():
        flag = "" if is_secret(spec) else f"`{flag_name(cls, field)}`"
        default = f"`{shown}`" if (shown := shown_default(spec)) else ""
        rows.append(f"| {flag} | `{env_name(field)}` | {default} | {spec.description} |")
    return "\n".join(rows)


def tables() -> dict[str, str]:
    """Name of a table, as its markers write it, to its text."""
    return {"up": settings_table(UpSettings)}


def with_tables(text: str) -> str:
    """`text` with every marked table as the code has it."""
    for name, table in tables().items():
        block = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = block.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for path in (ROOT / "README.md",):
        path.write_text(with_tables(path.read_text()))
