"""Servers: the edge node. The only place of comoe where code is asynchronous; no torch here."""
