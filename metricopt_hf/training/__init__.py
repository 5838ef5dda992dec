"""The run: Trainer with a metric phase."""
