"""Decisions that both workers share: admission, chunk budget, memory rules, the step plan. Pure."""
