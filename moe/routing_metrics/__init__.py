"""Figures of a Routing beyond its load, one file for each kind of question.

``agreement`` (with another routing), ``chunks`` (what consecutive tokens need together), ``drops`` (what a capacity
leaves out, and where), ``tokens`` (slots, weights and gradients of single tokens), ``cost`` (flops), ``prefetch`` (what
the layer before tells), ``labels`` (what experts tell of tokens). The load itself is in ``moe.metrics``. All but
``prefetch`` are computed from the N entries, not from a dense T x E matrix: a million experts are no trouble to them.
"""
