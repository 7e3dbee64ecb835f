"""Who stays in a cache of experts: one file a family of policies."""
