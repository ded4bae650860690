"""Attacks: what a hostile image, store or user tries, and what must come of it."""
