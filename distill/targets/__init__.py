"""What the teacher thinks of a trace: a sparse next-token distribution for every supervised token, on disk.

    spec    which distribution is kept, and what a file says of itself
    kinds   from the teacher's logits to that distribution
    codec   from the distribution to bytes and back, with a stated error
    bits    integers as bit streams
    files   shards of rows: append, resume, read any row

A row is one trace. FORMAT.md describes a file byte by byte. Only `kinds` knows torch.
"""
