"""What both training loops share."""
from training.run import *  # noqa: F403
