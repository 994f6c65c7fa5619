"""Everything between a file on disk and the tensors of the model."""
from data.datasets import *  # noqa: F403
from data.tokenizer import *  # noqa: F403
