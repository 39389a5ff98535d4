"""Who to talk to, and how bytes come."""
