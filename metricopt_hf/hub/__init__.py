"""Sharing on the Hub: value functions, model cards, and the client's errors in words."""

from .value_function import ValueFunction

__all__ = ["ValueFunction"]
