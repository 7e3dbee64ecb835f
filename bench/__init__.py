"""How things are measured: command line, plan, rings of workers, sampling, host facts. The parent imports no torch."""
