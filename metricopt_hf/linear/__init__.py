"""Near phi: predictions as a linear function of compact coordinates, and the metric on these."""
