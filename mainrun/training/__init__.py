"""Turns a model and batches into trained parameters: step, loop, evaluation, checkpoints."""
