"""How experts are executed: one file a backend, described in ``plugins``; nothing here imports torch until it loads.

``rules`` says which layers a backend takes, ``convert`` turns one boundary into another, ``session`` holds what all of
them share, and ``bridge`` gives every backend to transformers models.
"""
