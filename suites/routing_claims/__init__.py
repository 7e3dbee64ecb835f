"""What papers say of their routing and no training is needed to see, one file per family; imported by workers only.

A claim is a function of a ``Scene``, which makes seeded numbers and registered routers, to an ``Outcome``. Every family
has its own in ``CLAIMS``, under the names that ``claims_plugins`` gives to the parent.
"""
