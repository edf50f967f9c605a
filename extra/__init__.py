"""Luxuries: one file each. The six files above work without this folder; README.md says what each is for."""
