"""kvferry: disaggregated LLM serving. `docs/architecture.md` says who imports whom."""

__version__ = "0.1.0"
