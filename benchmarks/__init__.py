"""Measurements: each prints its command's table; nothing in the project imports them."""
