"""Methods against each other on one's own data; what the example scripts share."""
