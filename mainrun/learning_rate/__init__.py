"""The learning-rate range test: at which rate the training loss of a config falls fastest."""

from mainrun.learning_rate.curve import Curve, NoAnswer, steepest
from mainrun.learning_rate.picture import draw
from mainrun.learning_rate.ramp import Ramp, decimal
from mainrun.learning_rate.range_test import Found, as_dict, find

__all__ = ["Curve", "Found", "NoAnswer", "Ramp", "as_dict", "decimal", "draw", "find", "steepest"]
