"""From text files to training blocks.

    sources   finds .txt and .jsonl files and reads documents out of them
    prepare   tokenises them in parallel into Megatron-Core shards (.bin + .idx) and a dataset.json
    manifest  dataset.json: what a folder holds, by count and by hash
    indexed   the shard format itself
    dataset   fixed-length blocks over a split, and the order in which a run visits them
    verify    re-checks a folder against its dataset.json

Nothing is imported here: reading a manifest on a login node needs neither numpy nor a tokenizer.
"""
