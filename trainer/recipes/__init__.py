"""Recipes that ship with lmworks, one YAML file each; `lmworks run NAME` finds them here by name."""
