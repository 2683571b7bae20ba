from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from tests.contract.foreign import HomeMade, vision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lamina import io, probe
from lamina.anatomy import dissect, get
from lamina.batches import call, logits
from lamina.errors import AnatomyError, LaminaError
from lamina.models import Transformer
from lamina.objectives import Ponder, WeightedExits
from lamina.rewrite import (
    DropBlock,
    EarlyExit,
    EarlyExitModel,
    LambdaHead,
    check_order,
    exit_distribution,
    history,
    q_exit,
    replay,
    rewrite,
)
from lamina.rewrite.early_exit.leaving import ByPatience

Made = tuple[nn.Module, dict[str, Tensor]]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


def mask(rows: int, context: int) -> Tensor:
    """Rows of unequal length; the first is whole."""
    lengths = context - torch.arange(rows) % max(context - 1, 1)
    return (torch.arange(context) < lengths[:, None]).long()


def classifier(depth: int = 2, **options: Any) -> Transformer:
    return Transformer(depth, 16, 2, vocabulary=32, context=8, causal=False, **({"classes": 3} | options))


def text(rows: int = 5, context: int = 7) -> dict[str, Tensor]:
    return {"input_ids": tokens(rows, context), "attention_mask": mask(rows, context)}


EXAMPLES = [
    Example("pass", "early_exit", model=classifier, batch=text, bad={"q": 0.0}),
    Example(
        "pass",
        "early_exit",
        {"heads": "per_layer", "criterion": "patience", "patience": 1},
        model=classifier,
        batch=text,
        bad={"patience": 2},
    ),
]


def ours() -> Made:
    torch.manual_seed(0)
    return classifier(4, dropout=0.1).eval(), text()


def class_token() -> Made:
    torch.manual_seed(0)
    return classifier(4, pool="class").eval(), text()


def home_made() -> Made:
    torch.manual_seed(0)
    return HomeMade().eval(), {"inputs": torch.randn(5, 7, 5)}


def vit() -> Made:
    model, _ = vision()
    return model.eval(), {"pixel_values": torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def hugging_face(name: str, **options: Any) -> Made:
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "num_labels": 3, "pad_token_id": 0} | options
    if name == "DistilBert":
        kept = {"vocab_size", "num_labels", "pad_token_id"}
        sizes = {k: v for k, v in sizes.items() if k in kept} | {"dim": 16, "n_layers": 4, "n_heads": 2}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForSequenceClassification")(getattr(transformers, f"{name}Config")(**sizes))
    for p in model.parameters():
        # As they are drawn, all rows look nearly alike.
        p.data.mul_(6.0 if p.dim() > 1 else 1.0)
    batch = text()
    return model.eval(), {**batch, "input_ids": batch["input_ids"] * batch["attention_mask"]}


def torch_encoder() -> Made:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 4)
            self.answer = nn.Linear(16, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            # A mask of tokens by tokens, which for seven examples has as many rows as there are examples.
            hidden = self.encoder(inputs, mask=torch.zeros(7, 7))
            return self.answer(hidden[:, 0])

    torch.manual_seed(0)
    return Encoder().eval(), {"inputs": torch.randn(7, 7, 16)}


MODELS: dict[str, Any] = {
    "ours": ours,
    "class_token": class_token,
    "home_made": home_made,
    "torch_encoder": torch_encoder,
    "vit": vit,
    "bert": lambda: hugging_face("Bert"),
    "roberta": lambda: hugging_face("Roberta"),
    "albert": lambda: hugging_face("Albert", embedding_size=8),
    "distilbert": lambda: hugging_face("DistilBert"),
    "llama": lambda: hugging_face("Llama", num_key_value_heads=1),
}


def lively(model: nn.Module) -> EarlyExitModel:
    """Give the lambda head weights that tell rows apart."""
    assert isinstance(model, EarlyExitModel)
    generator = torch.Generator().manual_seed(5)
    for p in model.lambda_head.parameters() if model.lambda_head is not None else ():
        p.data.normal_(0.0, 0.7 if p.dim() > 1 else 0.2, generator=generator)
    for p in model.heads.parameters() if model.heads is not None else ():
        p.data.normal_(0.0, 1.0, generator=generator)
    return model.eval()


def q_between(model: EarlyExitModel, batch: Mapping[str, Tensor]) -> float:
    """A q by which rows leave at different layers."""
    reached = run(in_training_without_dropout(model), batch)["exit_log_p"].exp().cumsum(1)[:, 1]
    model.eval()
    return float(reached.sort().values[1:3].mean())


def exits(name: str, **options: Any) -> tuple[EarlyExitModel, nn.Module, dict[str, Tensor]]:
    model, batch = MODELS[name]()
    return lively(rewrite(copy.deepcopy(model), EarlyExit(**options), data=[batch])), model, batch


@torch.no_grad()
def run(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    return call(model, batch)


def in_training_without_dropout(model: EarlyExitModel) -> EarlyExitModel:
    model.eval().training = True
    return model


def by_hand(model: EarlyExitModel, original: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Streams after all layers of the original, then distribution and answers, one layer at a time."""
    trunk = dissect(original).trunk()
    with torch.no_grad(), probe.capture(original, outputs=[b.path for b in trunk.blocks]) as seen:
        call(original, batch)
    streams = [s for b in trunk.blocks for s in seen.tensors(b.path)]
    at = batch.get("attention_mask")
    h = []
    for x in streams:
        for step in model.tail.before:
            x = get(original, step)(x)
        if model.tail.pool == "mean":
            weight = torch.ones(x.shape[:2]) if at is None else at.float()
            x = (x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        elif model.tail.pool == "last":
            x = x[torch.arange(len(x)), at.sum(1) - 1]
        else:
            x = x[:, 0]
        for step in model.tail.after:
            x = {"tanh()": torch.tanh, "relu()": torch.relu}[step](x) if step.endswith("()") else get(original, step)(x)
        h.append(x)
    answers = torch.stack([get(original, model.tail.head)(x) for x in h], 1)
    lambdas, before = [], torch.zeros_like(h[0])
    for x in h:
        z = torch.cat((x, before), 1)
        for layer in model.lambda_head.hidden:
            z = torch.tanh(layer(z))
        lambdas.append(model.lambda_head.out(z)[:, 0].sigmoid())
        before = x
    left, p = torch.ones(len(h[0])), []
    for i, chance in enumerate(lambdas):
        p.append(left if i == len(lambdas) - 1 else left * chance)
        left = left * (1 - chance)
    return torch.stack(p, 1), answers


# 1. closed forms


def test_equal_chances_give_the_truncated_geometric_and_q_is_passed_strictly() -> None:
    chance = 0.3
    a = torch.full((2, 5), torch.tensor(chance).logit())
    expected = torch.tensor([chance * (1 - chance) ** i for i in range(4)] + [(1 - chance) ** 4])
    torch.testing.assert_close(exit_distribution(a).exp(), expected.expand(2, -1))
    log_p = exit_distribution(torch.zeros(1, 3))
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.5, 0.25, 0.25]]))
    assert [int(q_exit(log_p, q)) for q in (0.5, 0.49, 0.75, 1.0)] == [2, 1, 3, 3]
    assert exit_distribution(torch.zeros(3, 1)).exp().tolist() == [[1.0]] * 3
    assert q_exit(exit_distribution(torch.zeros(3, 1)), 0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize("n", [1, 7, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_logits_keep_a_sum_of_one_and_finite_gradients(n: int, dtype: torch.dtype) -> None:
    a = (60 * torch.rand(50, n, generator=torch.Generator().manual_seed(n)) - 30).to(dtype).requires_grad_()
    log_p = exit_distribution(a)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(50), rtol=0, atol=1e-6)
    lam = a.detach().double().sigmoid()
    before = torch.cat((torch.ones(50, 1).double(), (1 - lam).cumprod(1)[:, :-1]), 1)
    product = torch.cat((lam[:, :-1], torch.ones(50, 1).double()), 1) * before
    torch.testing.assert_close(log_p.exp().double(), product, rtol=1e-5, atol=1e-5)
    log_p.sum().backward()
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(log_p).all()


@pytest.mark.parametrize("kind", ["cat", "diff", "single", "rnn"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layer_by_layer_the_head_says_what_it_says_at_once(kind: Any, layers: int) -> None:
    torch.manual_seed(0)
    head, h = LambdaHead(7, kind, layers).eval(), torch.randn(3, 5, 7)
    assert len(head.hidden) == (0 if layers == 1 else layers)
    carried, found = None, []
    for i in range(5):
        score, carried = head.step(h[:, i], carried)
        found.append(score)
    torch.testing.assert_close(torch.stack(found, 1), head(h))
    if kind == "cat" and layers == 1:
        expected = F.linear(torch.cat((h[:, 0], torch.zeros(3, 7)), 1), head.out.weight, head.out.bias)[:, 0]
        torch.testing.assert_close(found[0], expected)


# 2. against a reference, on models of all sorts


@pytest.mark.parametrize("name", MODELS)
def test_rows_leave_where_the_distribution_says_and_answer_what_that_layer_answers(name: str) -> None:
    model, original, batch = exits(name)
    p, answers = by_hand(model, original, batch)
    rows = torch.arange(len(p))
    plain = logits(run(original, batch))
    for q in (0.2, 0.5, 0.8):
        model.q = q
        layer = torch.tensor([next((i + 1 for i in range(4) if row[: i + 1].sum() > q), 4) for row in p[:, :3]])
        assert torch.equal(q_exit(p.log(), q), layer)
        for model.compact in (True, False):
            found = run(model, batch)
            assert torch.equal(found["exit_layer"], layer)
            torch.testing.assert_close(found["logits"], answers[rows, layer - 1], rtol=1e-4, atol=1e-5)
    model.q = 1.0
    found = run(model, batch)
    # At full depth it is the model as it was; torch's own encoder leaves its fused kernel.
    torch.testing.assert_close(found["logits"], plain, rtol=0, atol=1e-5 if name == "torch_encoder" else 0)
    assert found["exit_layer"].tolist() == [4] * len(p)
    trained = run(in_training_without_dropout(model), batch)
    torch.testing.assert_close(trained["exit_log_p"].exp(), p, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained["exit_logits"], answers, rtol=1e-4, atol=1e-5)
    assert torch.equal(trained["logits"], trained["exit_logits"][:, -1])


@pytest.mark.parametrize(("name", "options"), [
    ("bert", {}),
    ("ours", {"lambda_input": "rnn"}),
    ("ours", {"heads": "per_layer", "criterion": "patience", "patience": 1}),
])  # fmt: skip
def test_a_batch_is_what_its_rows_are_alone(name: str, options: dict[str, Any]) -> None:
    model, _, batch = exits(name, **options)
    if model.criterion == "q":
        model.q = q_between(model, batch)
    together = run(model, batch)
    assert len(set(together["exit_layer"].tolist())) > 1, "the test needs rows that leave apart"
    for row in range(5):
        alone = run(model, {k: v[row : row + 1] for k, v in batch.items()})
        assert alone["exit_layer"] == together["exit_layer"][row]
        torch.testing.assert_close(alone["logits"][0], together["logits"][row], rtol=1e-4, atol=1e-5)


# 3. what a toy would not do


def calls_of(model: EarlyExitModel, batch: Mapping[str, Tensor]) -> list[int]:
    """How many rows the attention of each layer that ran was given."""
    seen: list[int] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(len(args[0] if args else kwargs["hidden_states"]))

    paths = [b.sublayers[0].path for b in dissect(model.model).trunk().blocks]
    with probe.observe(model.model, {}, before=dict.fromkeys(paths, note)):
        run(model, batch)
    return seen


@pytest.mark.parametrize("name", ["bert", "albert", "ours"])
def test_what_comes_after_the_exit_is_not_computed(name: str) -> None:
    model, _, batch = exits(name)
    model.q = q_between(model, batch)
    layers = run(model, batch)["exit_layer"]
    expected = [n for i in range(4) if (n := int((layers > i).sum()))]
    assert len(expected) > 1
    assert expected[-1] < 5
    assert calls_of(model, batch) == expected
    row = int(layers.argmin())
    alone = {k: v[row : row + 1] for k, v in batch.items()}
    assert calls_of(model, alone) == [1] * int(layers[row])
    model.compact = False
    assert calls_of(model, batch) == [5] * 4


def test_depth_does_not_fall_with_q_and_does_not_vary_and_a_draw_follows_the_distribution() -> None:
    model, original, batch = exits("ours")
    depths = []
    for q in (1e-6, 0.2, 0.4, 0.6, 0.8, 1.0):
        model.q = q
        layers = [run(model, batch)["exit_layer"] for _ in range(3)]
        assert all(torch.equal(layers[0], other) for other in layers)
        depths.append(float(layers[0].float().mean()))
    assert depths == sorted(depths)
    assert (depths[0], depths[-1]) == (1.0, 4.0)
    one = {k: v[:1, :1] for k, v in batch.items()}
    p, _ = by_hand(model, original, one)
    model.criterion = "sample"
    torch.manual_seed(0)
    many = {k: v.expand(10_000, -1) for k, v in one.items()}
    drawn = torch.bincount(run(model, many)["exit_layer"], minlength=5)[1:].double()
    chi_square = ((drawn - 10_000 * p[0].double()).square() / (10_000 * p[0].double())).sum()
    assert chi_square < 11.34, "three degrees of freedom, p > 0.01"


def test_the_expectation_is_the_mean_of_the_answers() -> None:
    model, original, batch = exits("ours", criterion="expectation")
    for one in (model.model, original):
        one.head.weight.data.mul_(50.0)
    p, answers = by_hand(model, original, batch)
    expected = (p[..., None] * answers.softmax(-1)).sum(1)
    torch.testing.assert_close(run(model, batch)["logits"].softmax(-1), expected)


def test_patience_waits_for_answers_on_end_and_each_layer_has_its_classifier() -> None:
    model, _, batch = exits("ours", heads="per_layer", criterion="patience", patience=2)
    assert model.lambda_head is None
    trained = run(in_training_without_dropout(model), batch)
    answers = trained["exit_logits"]
    assert "exit_log_p" not in trained
    expected = []
    for row in answers.argmax(-1).tolist():
        count, layer = 0, 4
        for i in range(1, 4):
            count = count + 1 if row[i] == row[i - 1] else 0
            if count == 2:
                layer = i + 1
                break
        expected.append(layer)
    for model.compact in (True, False):
        found = run(model.eval(), batch)
        assert found["exit_layer"].tolist() == expected
        rows = torch.arange(5)
        torch.testing.assert_close(found["logits"], answers[rows, found["exit_layer"] - 1])
    with pytest.raises(LaminaError, match="needs a lambda head"):
        model.criterion = "q"
    with pytest.raises(LaminaError, match="have no lambda head"):
        Ponder()(model.train(), {**batch, "labels": torch.zeros(5, dtype=torch.long)})


def test_patience_begins_again_with_every_change() -> None:
    script = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 0, 1, 0]])
    rule = ByPatience(lambda h, layer: F.one_hot(h[:, layer - 1], 2).float(), 2, 0.1)
    left = torch.stack([rule.leaves(script, i) for i in range(1, 6)], 1)
    assert left.tolist() == [[False, False, False, False, True], [False, False, True, False, False], [False] * 5]


def test_patience_with_one_number_counts_answers_that_are_near() -> None:
    torch.manual_seed(0)
    model = rewrite(
        classifier(4, classes=1).eval(),
        EarlyExit(heads="per_layer", criterion="patience", patience=1, tolerance=1e9),
        data=[text()],
    )
    assert run(model, text())["exit_layer"].tolist() == [2] * 5


@pytest.mark.parametrize(("pool", "causal"), [("auto", False), ("mean", False), ("cls", False)])
def test_a_bare_encoder_gets_a_classifier_and_its_pooler_is_used(pool: Any, causal: bool) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    torch.manual_seed(0)
    bare, batch = BertModel(config).eval(), text()
    out = run(bare, batch)
    model = lively(rewrite(bare, EarlyExit(classes=4, pool=pool, q=1.0), data=[batch]))
    weight = batch["attention_mask"][..., None].float()
    mean = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
    h = mean if pool == "mean" else out.pooler_output
    found = run(model, batch)
    torch.testing.assert_close(found.logits, model.classifier(h))
    assert type(found) is type(out)
    assert torch.equal(found.last_hidden_state, out.last_hidden_state)
    # What the classifier does not read still counts for the gradients of data-parallel processes.
    model.train()(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_a_mask_a_mean_is_of_all_tokens_though_one_is_the_padding() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    bare, ids = BertModel(BertConfig(vocab_size=32, pad_token_id=0, **sizes)).eval(), tokens(3, 7)
    ids[:, 2] = 0
    hidden = run(bare, {"input_ids": ids}).last_hidden_state
    model = rewrite(bare, EarlyExit(classes=2, pool="mean", q=1.0), data=[text()]).eval()
    torch.testing.assert_close(run(model, {"input_ids": ids}).logits, model.classifier(hidden.mean(1)))


def test_new_weights_hang_on_the_seed_alone_and_pretrained_ones_are_used() -> None:
    def new(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 100)
        model, batch = ours()
        state = torch.get_rng_state()
        made = rewrite(model, EarlyExit(seed=seed), data=[batch])
        assert torch.equal(torch.get_rng_state(), state)
        assert made.model is model
        return dict(made.lambda_head.named_parameters())

    one, again, other = new(0), new(0), new(1)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["hidden.0.weight"], other["hidden.0.weight"])
    assert 0.015 < float(one["hidden.0.weight"].detach().std()) < 0.025
    assert not one["hidden.0.bias"].any()


def test_ponder_trains_and_other_objectives_still_work() -> None:
    model, _, batch = exits("home_made")
    batch = {**batch, "labels": torch.arange(5) % 3}
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = []
    for _ in range(40):
        optimizer.zero_grad()
        losses = Ponder(prior=0.3)(model, batch)
        losses["loss"].backward()
        optimizer.step()
        found.append(float(losses["loss"].detach()))
    assert found[-1] < 0.7 * found[0]
    WeightedExits()(model, batch)["loss"].backward()
    evaluated = Ponder()(model.eval(), batch)
    assert 1 <= evaluated["depth"] <= 4
    expected = F.cross_entropy(run(model, batch)["logits"], batch["labels"])
    torch.testing.assert_close(evaluated["loss"].detach(), expected)


def test_it_is_saved_and_loaded_with_its_decision_also_over_a_model_of_transformers(tmp_path: Any) -> None:
    model, _, batch = exits("albert", q=0.4)
    io.save(model, tmp_path / "saved")
    decision = json.loads((tmp_path / "saved" / "architecture.json").read_text())["rewrites"][0]["decision"]
    assert (decision["q"], decision["depth"], decision["head"]) == (0.4, 4, "classifier")
    loaded = io.load(tmp_path / "saved")
    assert torch.equal(run(loaded, batch).logits, run(model, batch).logits)
    assert loaded.q == 0.4
    loaded.q = 0.9
    io.save(loaded, tmp_path / "again")
    assert io.load(tmp_path / "again").q == 0.9


def test_after_a_drop_there_is_an_exit_less_and_not_the_other_way_round() -> None:
    model, batch = ours()
    model = rewrite(model, DropBlock(1), EarlyExit(), data=[batch])
    assert model.depth == 3
    again = replay(ours()[0], history(model))
    assert torch.equal(run(again.eval(), batch)["logits"], run(model.eval(), batch)["logits"])
    with pytest.raises(LaminaError, match="counts the blocks"):
        check_order([EarlyExit(), DropBlock(1)])
    with pytest.raises(LaminaError, match="one set of exits"):
        check_order([EarlyExit(), EarlyExit()])
    del model.model.blocks[1]
    with pytest.raises(LaminaError, match="the exits were made for 3"):
        run(model, batch)


def test_in_bf16_rows_leave_at_nearly_the_same_layers() -> None:
    model, _, batch = exits("bert")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(model, batch)
    assert (rounded["exit_layer"] - run(model, batch)["exit_layer"]).abs().max() <= 1
    model.bfloat16()
    assert torch.isfinite(run(model, batch)["logits"]).all()
    assert torch.isfinite(run(model.train(), batch)["exit_log_p"]).all()


def test_in_a_graph_all_layers_run_and_a_warning_says_so() -> None:
    model, _, batch = exits("ours")
    expected = run(model, batch)
    with pytest.warns(UserWarning, match="not known in a compiled or exported graph"):
        exported = torch.export.export(model, (), batch)
    found = exported.module()(**batch)
    assert torch.equal(found["exit_layer"], expected["exit_layer"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-5)


# 4. bad input


@pytest.mark.parametrize(("options", "words"), [
    ({"q": 0.0}, "0 < q <= 1"),
    ({"q": 1.5}, "0 < q <= 1"),
    ({"patience": 0}, "at least 1"),
    ({"criterion": "patience", "patience": 4, "heads": "per_layer"}, "never reached in 4 layers"),
    ({"criterion": "entropy"}, "q, sample, expectation, patience"),
    ({"pool": "max"}, "auto, cls, mean, last"),
    ({"lambda_input": "sum"}, "cat, diff, single, rnn"),
    ({"lambda_layers": 0}, "at least 1"),
    ({"heads": "two"}, "shared, per_layer"),
    ({"dropout": 1.0}, "0 <= dropout < 1"),
    ({"tolerance": 0.0}, "positive"),
    ({"classes": 0}, "at least 1"),
    ({"pool": "cls"}, "cannot follow the answer of Transformer"),
    ({"trunk": "block"}, "'block'"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    model, batch = ours()
    with pytest.raises(LaminaError, match=words):
        EarlyExit(**options).decide(model, [batch])


def test_models_without_a_place_for_exits_say_why() -> None:
    batch = text()
    with pytest.raises(AnatomyError, match="one answer a sequence"):
        EarlyExit().decide(Transformer(2, 16, 2, vocabulary=32, context=8), [batch])
    with pytest.raises(LaminaError, match="cannot tell what it takes"):
        EarlyExit().decide(HomeMade())
    with pytest.raises(AnatomyError, match="no repeated blocks"):
        EarlyExit().fits(nn.Linear(2, 2))
    two = nn.ModuleDict({"a": classifier(), "b": classifier()})
    with pytest.raises(AnatomyError, match="several trunks"):
        EarlyExit().fits(two)
    model, batch = ours()
    made = rewrite(model, EarlyExit(), data=[batch])
    with pytest.raises(LaminaError, match="exits already"):
        EarlyExit().decide(made, [batch])
    with pytest.warns(UserWarning, match="per_layer"):
        EarlyExit(criterion="patience")


def test_decoders_go_without_cache_and_do_not_generate() -> None:
    model, _, batch = exits("llama")
    assert run(model, batch).past_key_values is None
    with pytest.raises(LaminaError, match="without a cache"):
        model(**batch, use_cache=True)
    with pytest.raises(LaminaError, match="does not generate"):
        model.generate(batch["input_ids"])
    with pytest.raises(LaminaError, match="it is causal"):
        EarlyExit(pool="cls").decide(model.model, [batch])


def test_gradient_checkpointing_of_either_kind_changes_no_gradient() -> None:
    class Checkpointed(HomeMade):
        reentrant: bool | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.read(x)[0]
            for block in self.stack:
                x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            return self.answer(self.norm(x)).mean(1)

    torch.manual_seed(0)
    batch = {"inputs": torch.randn(5, 7, 5), "labels": torch.arange(5) % 3}
    model = rewrite(Checkpointed().eval(), EarlyExit(), data=[batch])
    assert isinstance(model, EarlyExitModel)
    found = []
    for model.model.reentrant in (None, False, True):
        model.zero_grad()
        Ponder()(in_training_without_dropout(model), batch)["loss"].backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_setting_q_to_what_cannot_be_is_refused_and_changes_nothing() -> None:
    model, _, _ = exits("ours")
    for value in (0.0, -1.0, 2.0, True):
        with pytest.raises(LaminaError, match="0 < q <= 1"):
            model.q = value
    assert model.q == 0.5
