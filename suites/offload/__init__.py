"""What suite ``offload`` runs: whole models whose experts lie in a slow tier, token by token."""
