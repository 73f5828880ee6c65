"""A tiny hybrid Qwen3.5-MoE with a tokenizer of words, and tasks for it: what the tests of the RL adapters train."""

import hf_models
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", *"abcdefgh", *(str(n) for n in range(10)), "task", "plan", "answer", ":", "copy", "reverse"]
TASKS = [{"prompt": f"task : {query}", "category": query[0], "answer": query[::2]} for query in ("a b c", "d e f")]


def tokenizer():
    words = {word: index for index, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def save(folder, **changes):
    """A checkpoint with its tokenizer in `folder`."""
    words = tokenizer()
    made = hf_models.model(vocab_size=len(WORDS), eos_token_id=1, pad_token_id=0, **changes)
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
