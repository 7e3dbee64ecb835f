"""How many bits each expert gets: router-aware calibration, sensitivities, budgets and the rules that spend them."""
