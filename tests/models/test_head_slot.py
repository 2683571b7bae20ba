"""Every model takes another head by name; the plain one stays what it was."""

import pytest
import torch
from torch import nn

from lamina.models import MetaFormer, ResNet, Transformer, VisionTransformer


class Scaled(nn.Linear):
    """A head of somebody else's with an initialisation of its own."""

    def __init__(self, in_features: int, outputs: int, fill: float = 0.5) -> None:
        super().__init__(in_features, outputs)
        nn.init.constant_(self.weight, fill)


HEAD = {"name": "tests.models.test_head_slot:Scaled", "fill": 0.25}
IMAGES = torch.zeros(2, 3, 8, 8)

MODELS = [
    (lambda **o: Transformer(1, 8, 2, vocabulary=7, context=4, **o), torch.zeros(2, 4, dtype=torch.long), 7),
    (lambda **o: Transformer(1, 8, 2, vocabulary=7, context=4, classes=3, **o), torch.zeros(2, 4, dtype=torch.long), 3),
    (lambda **o: VisionTransformer(8, 4, 1, 8, 2, classes=3, **o), IMAGES, 3),
    (lambda **o: ResNet((1,), (8,), stem="small", classes=3, **o), IMAGES, 3),
    (lambda **o: MetaFormer((1,), (8,), patch=(3, 1, 1), classes=3, **o), IMAGES, 3),
]


@pytest.mark.parametrize(("make", "inputs", "outputs"), MODELS)
def test_the_head_is_built_by_name_with_the_sizes_and_keeps_its_own_weights(make, inputs, outputs):
    model = make(head=HEAD)
    assert type(model.head).__name__ == "Scaled"
    assert torch.equal(model.head.weight, torch.full((outputs, 8), 0.25))
    assert model(inputs).shape[-1] == outputs


def test_the_plain_head_of_a_language_model_is_tied_and_another_one_is_not():
    plain = Transformer(1, 8, 2, vocabulary=7, context=4)
    assert plain.head.weight is plain.embedding.weight
    assert plain.head.bias is None
    other = Transformer(1, 8, 2, vocabulary=7, context=4, head=HEAD)
    assert other.head.weight is not other.embedding.weight
