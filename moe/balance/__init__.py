"""Losses over a Routing, each normalised so that its value means the same in every system; see ``registry``."""
