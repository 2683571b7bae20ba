"""The objective: terms, places, times, adapters, teachers, frozen parts, passes cut short, what is refused."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from tests.contract.example import Example
from torch import nn

from lamina.data import Columns, Data, indexed
from lamina.errors import AnatomyError, LaminaError, ShapeError
from lamina.objectives import Classification, Distillation, LogitDistillation, WeightedSum
from lamina.objectives.distillation import Hint, KnowledgeDistillation, SimilarityPreserving, TeacherEnsemble
from lamina.recipe import build


def net(width=6, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def rows(count=8):
    g = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(count, 4, generator=g), "labels": torch.randint(3, (count,), generator=g)}


EXAMPLES = [
    Example("objective", "logit_distillation", model=net, batch=rows, bad={"terms": ["hint"]}),
    Example(
        "objective",
        "distillation",
        options={"terms": ["knowledge_distillation", {"name": "hint", "student": "2", "adapter": [6, 6]}]},
        model=net,
        batch=rows,
        bad={"terms": [{"name": "hints", "student": "2"}]},
    ),
]


def hint(**options):
    return {"name": "hint", "student": "2", "teacher": "2", **options}


def test_the_loss_is_the_weighted_sum_of_terms_between_the_named_places():
    student, teacher, batch = net(), net(9, seed=1), rows()
    terms = [
        {"name": "knowledge_distillation", "temperature": 3.0, "alpha": 0.4},
        {"name": "similarity_preserving", "student": "1", "teacher": "3", "weight": 5.0},
        {"name": "hint", "student": "4:input", "teacher": "2", "weight": 0.5, "adapter": [6, 9]},
    ]
    objective = Distillation(teacher, terms=terms)
    losses = objective(student, batch)
    x = batch["inputs"]
    kd = KnowledgeDistillation(3.0, alpha=0.4)(student(x), teacher(x), batch["labels"])
    alike = SimilarityPreserving()(student[:2](x), teacher[:4](x))
    (adapter,) = objective.terms[2].adapters.values()
    apart = Hint()(adapter.channels.linear(student[:4](x)), teacher[:3](x))
    torch.testing.assert_close(losses["loss"], kd + 5 * alike + 0.5 * apart)
    torch.testing.assert_close(losses["similarity_preserving"], alike.detach())
    assert losses["count"] == 8
    assert (losses["active"], objective.needs) == (1.0, "model")
    losses["loss"].backward()
    assert all(p.grad is not None for p in [*student.parameters(), *objective.parameters()])
    assert len(list(objective.parameters())) == 2


def test_terms_come_and_go_with_the_progress_of_training():
    objective = Distillation(net(seed=1), terms=[hint(to=0.3), {"name": "dist", "from": 0.3}])
    logged = []
    for fraction in (0.0, 0.29, 0.3, 1.0):
        objective.set_progress(fraction)
        logged.append(set(objective(net(), rows())) & {"hint", "dist"})
    assert logged == [{"hint"}, {"hint"}, {"dist"}, {"dist"}]
    gap = Distillation(net(seed=1), terms=[hint(to=0.3)])
    gap.set_progress(0.5)
    student = net()
    losses = gap(student, rows())
    assert (losses["loss"], losses["active"]) == (0, 0)
    losses["loss"].backward()


def test_the_teacher_is_frozen_unchanged_and_stops_at_the_last_place():
    teacher, student = net(seed=1), net()
    before, ran = copy.deepcopy(teacher.state_dict()), []
    teacher[4].register_forward_hook(lambda *a: ran.append(1))
    objective = Distillation(teacher, terms=[hint()])
    optimizer = torch.optim.SGD([*student.parameters(), *objective.parameters()], lr=0.1)
    objective(student, rows())["loss"].backward()
    optimizer.step()
    assert not ran
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    teacher.train()
    with pytest.warns(UserWarning, match="teacher was in training mode: it is set to evaluation"):
        objective(student, rows())
    assert not teacher[1].training


def test_a_hint_stage_cuts_the_students_pass_short():
    student, ran = net(), []
    student[4].register_forward_hook(lambda *a: ran.append(1))
    objective = Distillation(net(seed=1), terms=[hint(to=0.5), {"name": "knowledge_distillation", "from": 0.5}], stop=True)  # fmt: skip  # noqa: E501
    losses = objective(student, rows())
    losses["loss"].backward()
    whole = Distillation(net(seed=1), terms=[hint()])(net(), rows())
    torch.testing.assert_close(losses["loss"], whole["loss"])
    assert losses["count"] == 8
    assert not ran
    assert student[4].weight.grad is None
    objective.set_progress(0.5)
    objective(student, rows())["loss"].backward()
    assert ran == [1]
    total = WeightedSum([(1.0, Classification()), (1.0, objective)])
    objective.set_progress(0.0)
    total(student, rows())["loss"].backward()
    assert ran == [1, 1], "beside an objective of outputs each runs for itself"


@pytest.mark.parametrize("options", [{"stop": True}, {}])
def test_the_teacher_is_through_before_the_student_has_a_graph(options):
    student, teacher, ran = net(), net(seed=1), []
    student[0].register_forward_hook(lambda *a: ran.append("student"))
    teacher[2].register_forward_hook(lambda *a: ran.append("teacher"))
    Distillation(teacher, terms=[hint()], **options)(student, rows())
    assert ran == ["teacher", "student"]


def test_nothing_hangs_on_the_model_and_nothing_is_kept_after_a_step():
    student, teacher = net(), net(seed=1)
    objective = Distillation(teacher, terms=[hint(), "knowledge_distillation"])
    seen = []
    handle = student[2].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    losses = objective(student, rows())
    losses["loss"].backward()
    handle.remove()
    del losses
    gc.collect()
    assert seen[0]() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*student.modules(), *teacher.modules()))
    assert objective._seen is None


def test_an_ensemble_answers_as_one_and_shows_its_members():
    one, two, batch = net(seed=1), net(9, seed=2), rows()
    objective = Distillation([one, two], terms=["knowledge_distillation", hint(teacher="0.2")])
    x = batch["inputs"]
    goal = (one(x) + two(x)) / 2
    losses = objective(net(), batch)
    torch.testing.assert_close(losses["knowledge_distillation"], KnowledgeDistillation()(net()(x), goal).detach())
    torch.testing.assert_close(losses["hint"], Hint()(net()[:3](x), one[:3](x)).detach())
    chances = TeacherEnsemble([one, two], "probabilities")(x).softmax(1)
    torch.testing.assert_close(chances, (one(x).softmax(1) + two(x).softmax(1)) / 2)
    assert {k.split(".")[1] for k in objective.state_dict() if k.startswith("teacher")} == {"0", "1"}
    nodes = [{"name": "tests.objectives.test_distillation:net", "seed": i} for i in (1, 2)]
    assert isinstance(build({"name": "distillation", "teacher": nodes}, "objective").teacher, TeacherEnsemble)


def test_frozen_paths_get_no_gradient_and_stay_in_evaluation_mode():
    student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    objective = Distillation(net(), frozen=["0", "1"], model=student)
    assert [n for n, p in student.named_parameters() if p.requires_grad] == ["3.weight", "3.bias"]
    statistics = student[1].running_mean.clone()
    student.train()
    WeightedSum([(1.0, Classification()), (1.0, objective)])(student, rows())["loss"].backward()
    assert torch.equal(student[1].running_mean, statistics)
    assert [n for n, p in student.named_parameters() if p.grad is not None] == ["3.weight", "3.bias"]
    with pytest.raises(AnatomyError, match="no module '7'"):
        Distillation(net(), frozen=["7"], model=student)


class Tokens(nn.Module):
    """A model of one's own that is called by keyword and calls its block twice, by keyword."""

    def __init__(self, width=6):
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(11, width), Block(width), nn.Linear(width, 11)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids)
        for _ in range(2):
            x = self.block(states=x)
        return {"logits": self.head(x)}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, *, states):
        return states + self.linear(states)


def text():
    ids = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_padding_counts_for_nothing_and_blocks_called_by_keyword_are_seen():
    torch.manual_seed(0)
    student, teacher, batch = Tokens(), Tokens(8), text()
    terms = [
        "knowledge_distillation",
        {"name": "hint", "student": "block", "adapter": [6, 8]},
        {"name": "similarity_preserving", "student": "block:input"},
        {"name": "attention_transfer", "student": "block"},
    ]
    objective = Distillation(teacher, terms=terms)
    losses = objective(student, batch)
    assert losses["count"] == 15
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], 5)}
    for name, value in objective(student, changed).items():
        torch.testing.assert_close(value, losses[name])
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = [m(batch["input_ids"])["logits"][kept] for m in (student, teacher)]
    torch.testing.assert_close(losses["knowledge_distillation"], KnowledgeDistillation()(*logits))
    empty = {**batch, "attention_mask": torch.zeros_like(kept)}
    nothing = Distillation(teacher, terms=["knowledge_distillation"])(student, empty)
    assert (nothing["loss"], nothing["count"]) == (0, 0)
    nothing["loss"].backward()


def test_micro_batches_weighted_by_their_count_give_the_gradient_of_the_whole():
    torch.manual_seed(0)
    whole, teacher, batch = Tokens(), Tokens(), text()
    split = copy.deepcopy(whole)
    objective = Distillation(teacher, terms=["knowledge_distillation"])
    losses = objective(whole, batch)
    losses["loss"].backward()
    for part in (slice(0, 1), slice(1, 3)):
        piece = objective(split, {k: v[part] for k, v in batch.items()})
        (piece["loss"] * piece["count"] / losses["count"]).backward()
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_hugging_face_student_follows_a_deeper_teacher():
    from transformers import BertConfig, BertForSequenceClassification

    def bert(depth, width):
        torch.manual_seed(depth)
        config = BertConfig(vocab_size=32, hidden_size=width, intermediate_size=16, num_hidden_layers=depth, num_attention_heads=2, num_labels=3)  # fmt: skip  # noqa: E501
        return BertForSequenceClassification(config).eval()

    student, teacher = bert(1, 8), bert(2, 12)
    terms = [
        {"name": "hint", "student": "bert.encoder.layer.0", "teacher": "bert.encoder.layer.1", "adapter": [8, 12]},
        {"name": "relational_kd", "student": "bert.pooler", "teacher": "bert.pooler", "angle": 0.0},
        {"name": "knowledge_distillation", "alpha": 0.5},
    ]
    objective = Distillation(teacher, terms=terms)
    batch = {**text(), "labels": torch.tensor([0, 2, 1])}
    losses = objective(student, batch)
    losses["loss"].backward()
    assert {"hint", "relational_kd", "knowledge_distillation"} <= set(losses)
    assert student.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_a_loss_of_ones_own_needs_no_more_than_two_tensors():
    student, teacher, x = net(), net(9, seed=1), rows()["inputs"]
    own = {"name": "torch.nn:SmoothL1Loss", "beta": 0.5, "student": ".logits"}
    losses = Distillation(teacher, terms=[own])(student, rows())
    torch.testing.assert_close(losses["loss"], F.smooth_l1_loss(student(x), teacher(x), beta=0.5))
    with pytest.raises(LaminaError, match="SmoothL1Loss compares features: name a path in `student`"):
        Distillation(teacher, terms=[{"name": "torch.nn:SmoothL1Loss"}])


def test_adapters_are_channels_nodes_or_modules():
    student, teacher = net(), net(9, seed=1)
    for adapter in ([6, 9], {"name": "linear", "in_features": 6, "out_features": 9}, nn.Linear(6, 9)):
        objective = Distillation(teacher, terms=[hint(adapter=adapter)])
        objective(student, rows())["loss"].backward()
        assert sum(p.numel() for p in objective.parameters()) == 63
    pair = {"name": "simple_representation", "student": ["2", ".logits"], "adapter": [[6, 9], None]}
    assert Distillation(teacher, terms=[pair])(student, rows())["loss"].isfinite()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"terms": [hint(name="hnit")]},
            r"terms\[0\].name: no loss of distillation is called 'hnit'; did you mean 'hint'",
        ),
        (
            {"terms": [hint(reduction="max")]},
            r"terms\[0\].reduction: expected one of 'mean', 'sum', got the text 'max'",
        ),
        (
            {"terms": [hint(wieght=2)]},
            r"terms\[0\].wieght: the term 'hint' has no option 'wieght'.*has name, student, .*weight",
        ),
        ({"terms": [{"name": "hint"}]}, "hint compares features: name a path in `student`"),
        ({"terms": [hint(weight=-1)]}, r"terms\[0\]: the weight of hint must be at least 0"),
        ({"terms": [hint(weight="much")]}, r"terms\[0\].weight: expected a number"),
        ({"terms": [{**hint(), "from": 0.5, "to": 0.5}]}, "hint runs from 0.5 to 0.5"),
        ({"terms": [hint(student="2:inptu")]}, r"'path', 'path:input' or '\.logits', got '2:inptu'"),
        ({"terms": [hint(student=["1", "2"])]}, "hint names 2 places of the student and 1 of the teacher"),
        ({"terms": [hint(student=["1", "2"], teacher=["1", "2"])]}, "hint takes 1 place a side, got 2"),
        ({"terms": [hint(student=3)]}, r"terms\[0\].student: expected a path or a list of paths, got 3"),
        ({"terms": [hint(layout="cbhw")]}, "layout of hint must be 'bchw' or 'btd'"),
        ({"terms": [hint(adapter=[6, 0])]}, r"terms\[0\].adapter: expected \[student's channels, teacher's channels\]"),
        ({"terms": []}, "terms are at least one"),
        ({"terms": ["dist"], "hidden": {"1": "1"}}, "stand in place of temperature, hidden and adapt"),
        ({"stop": True}, "stop ends a pass behind the last place of a term"),
        ({"cache": "folder"}, "cache keeps what a teacher says that stays the same: it needs a teacher"),
        ({"teacher": net(), "average": "median"}, None),
    ],
)
def test_options_that_do_not_fit_are_refused(options, sentence):
    if sentence is None:
        assert Distillation(**options).teacher is not None, "one teacher needs no average"
        return
    with pytest.raises(LaminaError, match=sentence):
        Distillation(**options)


def test_places_inside_need_the_model_and_predictions_do_not():
    with pytest.raises(LaminaError, match="looks inside the models, which `distillation` does"):
        LogitDistillation(net(), terms=[hint()])
    objective = LogitDistillation(net(seed=1), terms=["dist", {"name": "knowledge_distillation", "weight": 2.0}])
    student = net()
    assert objective.needs == "outputs"
    torch.testing.assert_close(objective.loss(student(rows()["inputs"]), rows())["loss"], objective(student, rows())["loss"])  # fmt: skip  # noqa: E501
    with pytest.raises(LaminaError, match="needs the model: call the objective, not its loss"):
        Distillation(net(), terms=[hint()]).loss(student(rows()["inputs"]), rows())


def data(count=8):
    return Data(Columns(rows(count)), Columns(rows(count)), 4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_paths_and_shapes_are_checked_before_training_with_and_without_memory(device):
    student, teacher = net().to(device), net(9, seed=1)
    assert Distillation(teacher, terms=[hint(adapter=[6, 9]), "dist"]).fits(student, data()) is None
    assert Distillation(teacher, hidden={"2": "2"}, adapt={"2": (6, 9)}).fits(student, data()) is None
    with pytest.raises(AnatomyError, match=r"terms\[0\]: student: Sequential has no module 'layer2'"):
        Distillation(teacher, terms=[hint(student="layer2")]).fits(student, data())
    with pytest.raises(AnatomyError, match=r"terms\[1\]: teacher: Sequential has no module '22'"):
        Distillation(teacher, terms=["dist", hint(teacher="22")]).fits(student)
    with pytest.raises(ShapeError, match=r"terms\[0\]: hint between '2' of the student and '2' of the teacher: hint got \(2, 6\).*\(2, 9\).*`adapter: \[6, 9\]`"):  # fmt: skip  # noqa: E501
        Distillation(teacher, terms=[hint()]).fits(student, data())
    with pytest.raises(ShapeError, match=r"hidden\['2'\].*adapt=\{'2': \(6, 9\)\} trains a map"):
        Distillation(teacher, hidden={"2": "2"}).fits(student, data())
    later = Distillation(teacher, terms=["dist", {**hint(student="9"), "from": 0.5}])
    assert later.fits(student, data(), until=0.5) is None
    memory = {"name": "contrastive_representation", "student": "2", "rows": 9, "student_features": 6, "teacher_features": 9}  # fmt: skip  # noqa: E501
    with pytest.raises(LaminaError, match="is 9, the data set has 8 training rows"):
        Distillation(teacher, terms=[memory]).fits(student, indexed(data()))


def test_a_compiled_student_is_seen_or_it_is_said_that_it_runs_eagerly():
    torch.compiler.reset()
    student = torch.compile(net(), backend="aot_eager")
    student(rows()["inputs"])
    objective = Distillation(net(seed=1), terms=[hint()])
    with pytest.warns(UserWarning, match="is compiled, and a compiled graph cannot be looked into"):
        losses = objective(student, rows())
    torch.testing.assert_close(losses["loss"], objective(net(), rows())["loss"])


def test_the_model_before_a_rewrite_teaches_by_terms_too():
    student, batch = net(), rows()
    objective = Distillation(terms=["knowledge_distillation", hint()])
    assert objective(student, batch)["active"] == 0
    objective.before_rewrite(student)
    with torch.no_grad():
        assert objective(student, batch)["loss"].abs() < 1e-6
        student[2].weight.mul_(2.0)
    assert objective(student, batch)["hint"] > 0
