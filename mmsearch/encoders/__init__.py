"""Encoders, and the runtimes behind them."""
