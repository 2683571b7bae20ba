from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from tests.contract.example import Example

from lamina.batches import call, logits
from lamina.errors import LaminaError, MissingExtra, RecipeError
from lamina.models.hugging_face import hugging_face

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(seed))


EXAMPLES = [
    Example(
        "model",
        "hugging_face",
        # Without use_cache the output is tensors alone, which torch.export asks for.
        options={"config": LLAMA | {"use_cache": False}},
        batch=lambda: {"input_ids": tokens(), "labels": tokens(1)},
        bad={"config": {"model_type": "lama"}},
    )
]
pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("config", "task", "name"),
    [
        (LLAMA, "auto", "LlamaForCausalLM"),
        (LLAMA, "base", "LlamaModel"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "auto", "LlamaForSequenceClassification"),
        (LLAMA | {"architectures": ["LlamaForCausalLM"]}, "sequence_classification", "LlamaForSequenceClassification"),
        (BERT, "auto", "BertForMaskedLM"),
        (BERT, "sequence_classification", "BertForSequenceClassification"),
        (BERT, "token_classification", "BertForTokenClassification"),
        (VIT, "auto", "ViTForImageClassification"),
    ],
)
def test_config_and_task_choose_the_class(config: dict[str, object], task: str, name: str) -> None:
    model = hugging_face(config=config, task=task)  # type: ignore[arg-type]
    assert type(model).__name__ == name
    assert model.config.hidden_size == 16


def test_same_seed_same_model_and_the_sizes_asked_for() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(hugging_face(config=LLAMA | {"num_labels": 3}, task="sequence_classification"))
    one, two = models
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.score.weight.shape == (3, 16)
    assert one.training
    attention, feeding, norms = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 32, 2 * 16
    expected = 32 * 16 + 2 * (attention + feeding + norms) + 16 + 3 * 16
    assert sum(p.numel() for p in one.parameters()) == expected


@pytest.mark.parametrize("task", ["auto", "causal_lm"])
def test_a_folder_gives_the_same_outputs_in_float32(tmp_path: Path, task: str) -> None:
    made = hugging_face(config=LLAMA).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter.bfloat16())
    copy.deepcopy(made).to(torch.bfloat16).save_pretrained(tmp_path)
    read = hugging_face(str(tmp_path), task=task)  # type: ignore[arg-type]
    assert type(read) is type(made)
    assert not read.training
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    batch = {"input_ids": tokens()}
    assert torch.equal(logits(call(read, batch)), logits(call(made, batch)))


@pytest.mark.parametrize(
    ("config", "task"), [(LLAMA, "auto"), (LLAMA, "base"), (BERT | {"num_labels": 3}, "sequence_classification")]
)
def test_the_node_it_remembers_builds_it_again(tmp_path: Path, config: dict[str, object], task: str) -> None:
    made = hugging_face(config=config, task=task)  # type: ignore[arg-type]
    made.save_pretrained(tmp_path)
    for model in (made, hugging_face(str(tmp_path))):
        node = dict(model.lamina_node)
        assert node.pop("name") == "hugging_face"
        if node["task"] == "auto":
            assert node["config"]["architectures"] == [type(made).__name__]
        with torch.device("meta"):
            again = hugging_face(**node)
        assert type(again) is type(made)
        assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either path or config, got neither"),
        ({"path": "x", "config": LLAMA}, "either path or config, got both"),
        ({"config": {"hidden_size": 3}}, "needs a model_type"),
        ({"config": {"model_type": "lama"}}, "no model_type 'lama'; did you mean .*'llama'"),
        ({"config": LLAMA | {"hidden_size": 33}}, r"LlamaConfig refuses its options: .*33"),
        ({"config": LLAMA | {"hiden_size": 8}}, "LlamaConfig has no option 'hiden_size'; did you mean 'hidden_size'"),
        ({"config": LLAMA, "task": "causal"}, "no task is called 'causal'; did you mean 'causal_lm'"),
        ({"config": LLAMA, "task": "image_classification"}, "llama has no head for the task 'image_classification'"),
        ({"config": LLAMA | {"architectures": ["LlamaForX"]}}, "no architecture 'LlamaForX'"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(LaminaError, match=words):
        hugging_face(**options)  # type: ignore[arg-type]


def test_options_under_a_types_own_name_and_the_general_one() -> None:
    by_alias = hugging_face(
        config={"model_type": "gpt2", "hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 9}
    )
    assert by_alias.config.n_embd == 16
    with pytest.raises(RecipeError, match="GPT2Config has no option 'n_emb'; did you mean 'n_embd'"):
        hugging_face(config={"model_type": "gpt2", "n_emb": 16})


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match=r"no folder .*nowhere.*downloads nothing"):
        hugging_face(str(tmp_path / "nowhere"))
    with pytest.raises(LaminaError, match=r"no config\.json"):
        hugging_face(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(LaminaError, match=r"no \*\.safetensors file"):
        hugging_face(str(tmp_path))


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r'pip install "lamina\[hf\]"'):
        hugging_face(config=LLAMA)
