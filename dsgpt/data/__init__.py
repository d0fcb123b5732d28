"""From text and conversations to training samples.

    sources, formats, texts, columns      find inputs and read documents and records out of them, in every format
    filters, duplicates                   which documents are left out
    prepare, plan, parts, tokenize_part, finish, forecast, choices, workers
                                          tokenise in parallel, on any number of machines, into Megatron-Core shards
    chat, chat_formats, chat_template     conversations -> ids and loss masks
    manifest, indexed                     dataset.json; the shard format itself
    dataset, packing, mixture, foreign    samples: blocks of text, packed conversations, several sources, others' files
    verify, summary                       re-check a folder; show what is in it
    train_tokenizer                       the sample a tokenizer is trained on

Nothing is imported here: reading a manifest on a login node needs neither numpy nor a tokenizer.
"""
