"""Layers: plain `nn.Module`s and the functions behind them.

layer_norm      layer normalisation and its recurrent nets
pooling_mixer   pooling and the control arms of the MetaFormer comparison
attention       multi-head attention on torch's scaled_dot_product_attention
"""
