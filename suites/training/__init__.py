"""Training of whole models: a trainer that knows no model, tasks for it, and ``tinymoe``. Imports no torch."""
