"""Small models that are trained here so that a published method has something to work on. Imports no torch."""
