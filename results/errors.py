"""The one exception of this folder."""

from __future__ import annotations


class ResultsError(Exception):
    """A mistake of the user or of the machine, told in one sentence that names the remedy."""


class DatabaseBusyError(ResultsError):
    """Another process holds the database file."""
