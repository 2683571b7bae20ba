"""Objectives: what a training step minimises.

objective     the protocol; weighted sums
supervised    next token, masked token, classification, regression
distillation  follow a teacher's logits and hidden states
"""
