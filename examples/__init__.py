"""Scripts to run from a clone, and what they share in `comparison`."""
