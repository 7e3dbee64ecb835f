"""What of a model fits where, and how fast it would decode there: the command ``moebench advise``. Imports no torch."""
