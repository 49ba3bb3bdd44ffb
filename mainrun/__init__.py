"""mainrun: train and tune GPT language models on one's own machine.

The command `mainrun` is the way in (`mainrun.cli`); DESIGN of the package: imports go down only,
cli → run → training → model, data → config, tracking, errors.
"""

__version__ = "0.1.0"
