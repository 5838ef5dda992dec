"""From phi to a number: the metric, the model's predictions, and the observations made of both."""
