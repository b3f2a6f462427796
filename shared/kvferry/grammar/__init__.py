"""Grammars: what the text of a choice must be, compiled for one model's vocabulary by llguidance. No torch."""
