"""Whole networks, built from the layers of `lamina.nn` through named slots.

transformer         encoder or decoder with slots for mixer, norm and feed-forward
vision_transformer  ViT
resnet              small and standard ResNets
metaformer          the MetaFormer template and PoolFormer's sizes
hugging_face        any transformers model, by config or folder
"""
