"""Everything between a file on disk and the tensors of the model.

On the reading path: tokenizer (and chat template), images (uris: how they are named), prompts,
sequences (rows and packs), completions (what is sampled), responses (packs of them).
Aside from it: datasets, which says how a record of a file becomes an example, and what it calls:
schemas, turns (records that are conversations), fields, options, unread.
"""

# ruff: noqa: F401
from data.datasets import Example, Loaded, load_examples, read_examples
from data.images import (
    ImageConfig,
    ImageSource,
    image_grid,
    load_image,
    preprocess_image,
    smart_resize,
)
from data.prompts import (
    STYLES,
    Prompt,
    Question,
    chat_prompt,
    format_prompt,
    make_prompt,
    question_text,
)
from data.sequences import (
    Pack,
    Row,
    batches,
    encode_example,
    epoch_order,
    make_pack,
    make_row,
    num_steps,
    plan_packs,
)
from data.tokenizer import Tokenizer, check_vocabulary, render_chat
from hub.config import Grid
from hub.errors import InputError, read_json
