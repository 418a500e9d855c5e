"""Layers compared on little data, before a pair is trained at one of them."""
