"""What `torment.py` is made of: forked commands, the run they work on, kills, damage."""
