"""Packs and experts that are somewhere on the network."""
