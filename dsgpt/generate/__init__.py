"""Text from a trained model: rows of different lengths decoded together, keys and values cached.

sampling.py   which token comes next
decoder.py    rows that join and leave a batch, one token for each of them at a step
text.py       from prompts to texts: the tokenizer, stop strings, streaming
chat.py       from conversations to prompts, by the model's chat template
serve/        the same for many clients at once, over HTTP
"""
