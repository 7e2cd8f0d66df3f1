"""Several adapters trained on one frozen pass: other methods, or other tasks, on the same noised images.

Each is trained by a trainer of its own, with its own optimizer, average, validation, checkpoints and run folder, exactly as
if it were alone; what they share is the pass. `members` says who they are, `turns` lets their trainers take turns.
"""
