"""The probes of suite ``probe``: what they do with a model. Imported by workers only."""
