"""Layers and blocks that run whole or in part: what a pass makes of a trained network, and the view that steers it.

layers    linear layers, convolutions and batch norms of which the first channels run
blocks    blocks that can be left out
subnet    which part runs: depth, expand and kernel of every place
supernet  `supernet(model)`: set, sample, count the multiply-adds of a part
"""

from lamina.nn.elastic.blocks import BlockPlan as BlockPlan
from lamina.nn.elastic.blocks import ElasticBlock as ElasticBlock
from lamina.nn.elastic.blocks import GroupPlan as GroupPlan
from lamina.nn.elastic.layers import ElasticLayer as ElasticLayer
from lamina.nn.elastic.layers import elastic_layer as elastic_layer
from lamina.nn.elastic.reclass import plain_class as plain_class
from lamina.nn.elastic.reclass import restored as restored
from lamina.nn.elastic.subnet import Subnet as Subnet
from lamina.nn.elastic.supernet import Supernet as Supernet
from lamina.nn.elastic.supernet import is_elastic as is_elastic
from lamina.nn.elastic.supernet import supernet as supernet
