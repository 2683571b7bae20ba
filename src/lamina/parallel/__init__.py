"""Placing a model on several devices.

data_parallel  replicate (DDP), shard (FSDP2), and gather back to the bare module
"""
