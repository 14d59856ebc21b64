"""Speed and memory beside named peers, in one run on one machine: `losses`, `data` and `resume`."""
