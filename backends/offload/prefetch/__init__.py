"""Who is brought before it is asked for: one file a kind of knowledge."""
