"""Text to token ids and back.

    tokenizer            loads one from a folder, a file or by Hugging Face name; encodes, decodes, copies
    training             trains one on texts: sentencepiece BPE or unigram, or byte-level BPE
    encoder              encodes documents in bulk, by a fast engine where it can be trusted
    cuts                 finds where a text may be cut without a change of its ids
    sentencepiece_model  reads sentencepiece's .model files
    sentencepiece_json   turns a sentencepiece model into an equal tokenizer.json

Training on files, which needs to read them, is dsgpt.data.train_tokenizer.
"""

from __future__ import annotations

from dsgpt.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
