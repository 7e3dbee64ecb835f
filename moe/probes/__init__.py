"""What can be read off a model that runs: super experts, voids, lazy neurons, dictionaries, information, flow."""
