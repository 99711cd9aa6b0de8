"""The sections of `scripts/bench_gpu.py`, one module each, and the frame they are run in.

frame      cases, time allowances, and the loop that turns both into rows; knows nothing of what is measured
table      rows of all cards as Markdown
shapes     random models, rows and targets of real sizes
steps      a trainer's steps: seconds, tokens/s, peak memory
training   1: KD against SFT, 2: ours against TRL, 8: fp16 as on a T4
tests      3: the tests marked gpu, and the figures they record
loss       4: the loss alone
memory     5: the longest sequence under a limit
reading    6: score
writing    7: generate
"""
