"""Methods of different stages together, from a recipe: trained in bf16, saved, loaded, run again to equal numbers."""

import json

import pytest
import torch
from tests.contract.foreign import runs_bf16_lstm, tokens

import lamina
from lamina.batches import call, logits
from lamina.recipe import load as load_recipe
from lamina.rewrite import history
from lamina.train.metrics import read
from lamina.train.run import train

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind at all; " * 60

TRANSFORMER = "{name: transformer, depth: 4, width: 16, heads: 2}"
TEXT_DATA = "{name: text, source: '{folder}/book.txt', context: 16, batch: 4}"
DIGITS = "{name: digits, batch: 16}"

RECIPES = {
    # llm-drop + lamb + distillation from the model before the cut
    "drop_lamb_distillation": f"""
model: {TRANSFORMER}
data: {TEXT_DATA}
objective: [next_token, {{name: distillation, weight: 0.5, hidden: {{final_norm: final_norm}}}}]
optimizer: {{name: lamb, lr: 1e-2, schedule: {{name: warmup_cosine, warmup: 0.2}}}}
rewrite: [{{name: drop_attention, count: 1, at: 0.5}}]
""",
    # the same without hidden states, which a compiled graph does not show
    "drop_distillation_of_logits": f"""
model: {TRANSFORMER}
data: {TEXT_DATA}
objective: [next_token, {{name: distillation, weight: 0.5}}]
optimizer: {{name: lamb, lr: 1e-2}}
rewrite: [{{name: drop_mlp, count: 1, at: 0.5}}]
""",
    # layer-norm's pass + llm-drop + a reducer, on a transformers model
    "two_passes_on_a_hugging_face_model": """
model:
  name: hugging_face
  task: causal_lm
  config: {model_type: llama, vocab_size: 256, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 3,
           num_attention_heads: 2, num_key_value_heads: 1, use_cache: false}
data: {name: text, source: '{folder}/book.txt', context: 16, batch: 4}
objective: next_token
optimizer: {name: lars, lr: 0.5, momentum: 0.9}
gradients: median
rewrite:
  - {name: drop_block, count: 1, order: last, at: before}
  - {name: replace, old: LlamaRMSNorm, new: layer_norm, at: 0.5}
""",
    # metaformer + lamb + mean
    "metaformer_on_digits": f"""
model: {{name: metaformer, depths: [1, 1], widths: [8, 16], patch: [3, 1, 1], downsample: [3, 2, 1], layer_scale: 0.1}}
data: {DIGITS}
objective: {{name: classification, label_smoothing: 0.1}}
optimizer: {{name: lamb, lr: 1e-2, weight_decay: 0.01}}
gradients: mean
""",
    # metaformer's pass on a vision transformer, healed by distillation, norms replaced after training
    "attention_to_pooling_in_a_vit": f"""
model: {{name: vision_transformer, image: 8, patch: 2, depth: 3, width: 16, heads: 2}}
data: {DIGITS}
objective: [classification, {{name: distillation, weight: 1.0}}]
optimizer: {{name: adamw, lr: 3e-3}}
rewrite:
  - {{name: drop_mlp, count: 1, at: 0.3}}
  - {{name: replace, old: attention, new: pooling_mixer, at: 0.6}}
""",
    # the recurrent layer norm in a model of the user's own, under momentum
    "layer_norm_lstm_in_a_home_made_model": """
model: {name: "tests.contract.foreign:HomeMade"}
data: {name: "tests.composition.series:wiggles", batch: 8}
objective: classification
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
rewrite:
  - {name: replace, old: lstm, new: layer_norm_lstm, at: 0.5}
  - {name: drop_sublayers, count: 2, at: after}
""",
}

TRAIN = "train: {steps: 10, log_every: 1, evaluate_batches: 2, precision: bf16, seed: 3}\n"


def run(name, folder, out, extra=""):
    (folder / "book.txt").write_text(TEXT)
    text = "lamina: 1" + RECIPES[name].replace("{folder}", str(folder)) + TRAIN.replace("}", f"{extra}}}")
    overrides = [] if "lstm" not in name or runs_bf16_lstm() else ["train.precision=fp32"]
    return train(load_recipe(text, overrides), folder=folder / out)


def losses(folder):
    return [r["loss"] for r in read(folder / "metrics.jsonl") if r["event"] == "step"]


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "drop_distillation_of_logits"])
def test_a_recipe_trains_saves_loads_and_runs_again_to_the_same_numbers(name, tmp_path):
    done = run(name, tmp_path, "first")
    found = losses(tmp_path / "first")
    assert len(found) == 10
    assert all(torch.isfinite(torch.tensor(found)))
    recipe = load_recipe(tmp_path / "first" / "recipe.yaml")
    assert len(history(done.model)) == len(recipe.rewrite)
    assert (tmp_path / "first" / "report.html").stat().st_size > 5000
    loaded = lamina.load(tmp_path / "first" / "model")
    batch = {"input_ids": tokens(vocabulary=256)} if "text" in recipe.data["name"] else None
    if batch is None:
        shape = (2, 7, 5) if "HomeMade" in recipe.model["name"] else (2, 1, 8, 8)
        key = "inputs" if len(shape) == 3 else "pixel_values"
        batch = {key: torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        assert torch.equal(logits(call(loaded, batch)), logits(call(done.model, batch)))
    again = train(recipe, folder=tmp_path / "again")
    assert losses(tmp_path / "again") == found
    assert again.evaluation == done.evaluation


def test_a_compiled_run_rewrites_on_the_way_and_follows_the_eager_one(tmp_path):
    run("drop_distillation_of_logits", tmp_path, "eager")
    run("drop_distillation_of_logits", tmp_path, "compiled", ", compile: true")
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < 0.05


def test_the_rewrite_is_in_the_metrics_with_the_fate_of_every_state(tmp_path):
    run("layer_norm_lstm_in_a_home_made_model", tmp_path, "first")
    rows = [r for r in read(tmp_path / "first" / "metrics.jsonl") if r["event"] == "rewrite"]
    assert [r["pass"] for r in rows] == ["replace", "drop_sublayers"]
    assert any("weight" in n for n in rows[0]["derived"]), "the recurrent weights' momentum follows"
    assert rows[0]["fresh"], "gains are new"
    decision = json.loads((tmp_path / "first" / "model" / "architecture.json").read_text())["rewrites"][0]["decision"]
    assert decision["paths"] == ["read"]
