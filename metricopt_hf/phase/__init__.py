"""The metric phase: its steps, how far each guide is trusted, and which candidate is selected; no Trainer in it."""
