"""How good a model is.

loss.py        mean loss, perplexity and bits per byte of texts and prepared data
questions.py   records with a question and its answer, as prompts; what to do with long inputs
answers.py     answers that are generated, compared with those of the records: ROUGE, token F1, exact match
choices.py     the likeliest of given answers: accuracy, macro-F1
metrics.py     these numbers, each with its interval
harness.py     tasks of lm-evaluation-harness
"""
