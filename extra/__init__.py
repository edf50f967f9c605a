"""Luxuries: one file each. The core works without this folder; README.md says what each file is for."""
import warnings

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs numpy
