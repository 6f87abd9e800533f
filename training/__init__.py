"""Training: encoded shards in, stage directories out.

Importing this package imports nothing; `training.results` can be asked what is done without torch.
"""
