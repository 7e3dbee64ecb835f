"""Routing traces as what a cache of experts is asked for: accesses, made-up traces, recordings, figures."""
