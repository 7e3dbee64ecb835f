"""Figures of a Routing beyond its load, one file for each kind of question.

``agreement`` (with another routing), ``chunks`` (what consecutive tokens need together), ``drops`` (what a capacity
leaves out, and where), ``tokens`` (slots, weights and gradients of single tokens), ``cost`` (flops), ``prefetch`` (what
the layer before tells), ``labels`` (what experts tell of tokens). The load itself is in ``moe.metrics``. Everything is
computed from the N entries, never from a dense T x E matrix, so that a million experts are no trouble; what needs E^2
says so.
"""
