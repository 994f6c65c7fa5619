"""Everything between a file on disk and the tensors of the model."""

from data.datasets import (
    Example,
    Loaded,
    convert_examples,
    load_examples,
    read_examples,
    repeated_id,
    report_bad,
)
from data.images import (
    MERGE,
    PATCH,
    Grid,
    ImageConfig,
    ImageSource,
    image_grid,
    load_image,
    preprocess_image,
    smart_resize,
)
from data.prompts import Prompt, chat_prompt, format_prompt, make_prompt, question_text
from data.sequences import Pack, Row, deal, encode_example, epoch_order, make_pack, make_row
from data.tokenizer import Tokenizer, check_vocabulary, render_chat
from hub.errors import InputError, read_json

__all__ = [name for name in dir() if not name.startswith("_")]
