"""Every loss: torchdistill's numbers, what it is 0 for, what it does not see, small cases by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamina.errors import LaminaError, ShapeError
from lamina.objectives import distillation as d
from lamina.objectives.distillation.feature_losses import activity
from lamina.objectives.distillation.logit_losses import soft_divergence
from lamina.objectives.distillation.self_supervision import least_error, own_image, rotation_cosines
from lamina.objectives.distillation.trained_losses import (
    factor_distance,
    gaussian_surprise,
    hierarchical_context,
    uncertain_error,
)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(7) % 3
S, T = normal(7, 5, seed=0) * 2, normal(7, 5, seed=1) * 2
EARLY_S, EARLY_T = normal(7, 4, 5, 5, seed=2), normal(7, 4, 5, 5, seed=3)
LATE_S, LATE_T = normal(7, 6, 3, 3, seed=4), normal(7, 6, 3, 3, seed=5)
WIDE_T, VECTORS_T = normal(7, 9, 5, 5, seed=6), normal(7, 9, seed=8)
VARIANCE, LOG_VARIANCE = normal(4, 1, 1, seed=9).exp(), normal(7, 5, seed=10)
UNIT_S, UNIT_T = F.normalize(S), F.normalize(T)

# What torchdistill 1.1.5 gives for these very tensors: the loss, and the sum of its gradient's entries, each times the
# cosine of its number, a tensor of the student's at a time.
PEER = {
    "knowledge_distillation": (lambda s: d.KnowledgeDistillation(4.0, alpha=0.3)(s, T, LABELS), [S]),
    "knowledge_distillation plain": (lambda s: d.KnowledgeDistillation(3.0, scale=False)(s, T), [S]),
    "logit_standardization": (lambda s: d.LogitStandardization()(s, T, LABELS), [S]),
    "dist": (lambda s: d.DIST(1.0, 0.5, temperature=2.0)(s, T), [S]),
    "streamlined_instance": (lambda s: d.StreamlinedInstance()(s, T), [S]),
    "streamlined_direction": (lambda s: d.StreamlinedDirection()(s, T), [S]),
    "attention_transfer code": (lambda s: d.AttentionTransfer()(s, WIDE_T), [EARLY_S]),
    "attention_transfer paper": (lambda s: d.AttentionTransfer("paper")(s, WIDE_T), [EARLY_S]),
    "flow_of_solution": (lambda a, b: d.FlowOfSolution()([a, b], [EARLY_T, LATE_T]), [EARLY_S, LATE_S]),
    "activation_boundary": (lambda s: d.ActivationBoundary()(s, EARLY_T), [EARLY_S]),
    "inter_channel_correlation": (lambda s: d.InterChannelCorrelation()(s, EARLY_T), [EARLY_S]),
    "affinity": (lambda s: d.Affinity()(s, EARLY_T), [EARLY_S]),
    "hint": (lambda s: d.Hint("sum")(s, EARLY_T), [EARLY_S]),
    "simple_representation": (
        lambda f, s: d.SimpleRepresentation(eps=0.0)([f, s], [EARLY_T, T]),
        [EARLY_S, S],
    ),
    "dist_plus": (lambda f, s: d.DISTPlus()([s, f], [T, EARLY_T]), [EARLY_S, S]),
    "probabilistic_knowledge_transfer": (lambda s: d.ProbabilisticKnowledgeTransfer()(s, VECTORS_T), [S]),
    "relational_kd": (lambda s: d.RelationalKD()(s, VECTORS_T), [S]),
    "correlation_congruence": (lambda s: d.CorrelationCongruence()(s, UNIT_T), [UNIT_S]),
    "correlation_congruence bilinear": (lambda s: d.CorrelationCongruence("bilinear")(s, UNIT_T), [UNIT_S]),
    "similarity_preserving": (lambda s: d.SimilarityPreserving(1)(s, WIDE_T), [EARLY_S]),
    "factor_transfer": (lambda s: factor_distance(s, EARLY_T), [EARLY_S]),
    "factor_transfer of other orders": (lambda s: factor_distance(s, EARLY_T, 2, 1), [EARLY_S]),
    "variational_information": (lambda s: gaussian_surprise(s, VARIANCE, EARLY_T), [EARLY_S]),
    "prediction_with_uncertainty": (lambda s, v: uncertain_error(s, T, v), [S, LOG_VARIANCE]),
    "knowledge_review": (lambda s: hierarchical_context(s, EARLY_T), [EARLY_S]),
    "self_supervision_kd": (
        lambda s, e: d.SelfSupervisionKD(6, 6, rotation_ratio=0.5).parts(
            (e, normal(12, 6, seed=19)), (s, normal(12, 5, seed=17) * 2), torch.tensor([1, 4, 2]).repeat_interleave(4)
        ),
        [normal(12, 5, seed=16) * 2, normal(12, 6, seed=18)],
    ),
    "self_supervision_kd's first stage": (
        lambda e: F.cross_entropy(rotation_cosines(e), own_image(rotation_cosines(e))),
        [normal(12, 6, seed=18)],
    ),
}
NUMBERS = {
    "knowledge_distillation": (2.31042123, [-0.0395633206]),
    "knowledge_distillation plain": (0.193796992, [0.00146326772]),
    "logit_standardization": (3.83400774, [0.208756775]),
    "dist": (3.30191326, [-0.293804407]),
    "streamlined_instance": (1.12698627, [-0.0242600683]),
    "streamlined_direction": (1.74152851, [0.000825289637]),
    "attention_transfer code": (0.019178085, [-0.00224391697]),
    "attention_transfer paper": (0.683425128, [-0.0522711203]),
    "flow_of_solution": (7.68234587, [-0.108823359, 0.107448757]),
    "activation_boundary": (188.684952, [-3.48282051]),
    "inter_channel_correlation": (0.0314470157, [-0.00797594618]),
    "affinity": (0.221832752, [-0.000779415132]),
    "hint": (1371.65063, [-64.7745743]),
    "simple_representation": (19.1165752, [-0.36316061, 0.0415609106]),
    "dist_plus": (2.96622372, [-0.00282991026, -0.168299407]),
    "probabilistic_knowledge_transfer": (0.011182392, [0.00403087353]),
    "relational_kd": (0.176136076, [0.00640723296]),
    "correlation_congruence": (0.0243972689, [-0.0191469751]),
    "correlation_congruence bilinear": (0.0685621276, [-0.0467861407]),
    "similarity_preserving": (0.0127645414, [-0.00512027321]),
    "factor_transfer": (0.1106176, [-0.000797942688]),
    "factor_transfer of other orders": (0.175888747, [-0.00138094893]),
    "variational_information": (0.998347878, [-0.0259895921]),
    "prediction_with_uncertainty": (9.07980824, [-0.669890404, 1.74590278]),
    "knowledge_review": (1.19840455, [-0.0630496368]),
    "self_supervision_kd": (13.0655174, [-2.47436547, -0.184524685]),
    "self_supervision_kd's first stage": (1.08083236, [0.0225767195]),
}


@pytest.mark.parametrize("name", PEER)
def test_a_loss_and_its_gradients_are_torchdistills(name):
    function, tensors = PEER[name]
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    loss.backward()
    expected, gradients = NUMBERS[name]
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for leaf, projected in zip(leaves, gradients, strict=True):
        weights = torch.cos(torch.arange(leaf.numel()).float()).view_as(leaf)
        assert (leaf.grad * weights).sum().item() == pytest.approx(projected, rel=1e-5, abs=1e-6)


def test_every_loss_of_the_list_is_compared_with_torchdistill():
    assert {name.split(" ")[0].removesuffix("'s") for name in PEER} | {"contrastive_representation"} == set(d.LOSSES)


def test_contrast_with_a_memory_is_torchdistills_for_two_steps():
    s, t = (F.normalize(normal(4, 8, seed=i)) for i in (11, 12))
    rows = torch.tensor([3, 0, 7, 5])
    others = torch.randint(10, (4, 7), generator=torch.Generator().manual_seed(13))
    others[:, 0] = rows
    loss = d.ContrastiveRepresentation(10, 8, 8, width=8, negatives=6)
    loss.memory[0], loss.memory[1] = normal(10, 8, seed=14), normal(10, 8, seed=15)
    for expected in [(47.5940361, 11.6986189), (45.3465195, 5.1574564)]:
        leaf = s.clone().requires_grad_()
        found = loss.contrast(leaf, t, rows, others)
        found.backward()
        weights = torch.cos(torch.arange(32).float()).view_as(leaf)
        assert (found.item(), (leaf.grad * weights).sum().item()) == pytest.approx(expected, rel=1e-5)
    untouched = [1, 2, 4, 6, 8, 9]
    assert torch.equal(loss.memory[0][untouched], normal(10, 8, seed=14)[untouched])
    torch.testing.assert_close(loss.memory[:, rows].norm(dim=2), torch.ones(2, 4))


def test_contrast_knows_its_draws_by_number_and_leaves_rows_of_an_evaluation_out():
    first = d.ContrastiveRepresentation(10, 5, 9, width=4, negatives=6)
    second = d.ContrastiveRepresentation(10, 5, 9, width=4, negatives=6)
    index = torch.tensor([1, 2, 3, 9, 4, 0, 7])
    first(S, VECTORS_T, index)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        kept = first.memory.clone()
        assert first(S, VECTORS_T, index + 10) == 0
        assert torch.equal(first.memory, kept)
    assert torch.equal(first(S, VECTORS_T, index), second(S, VECTORS_T, index))
    # Every step of a training draws others, which no evaluation changes.
    drawn = first._draw(index)
    with torch.no_grad():
        assert torch.equal(first._draw(index), first._draw(index))
    assert not torch.equal(first._draw(index), drawn)
    with pytest.raises(LaminaError, match="row has the number 19, the memory has 10 rows"):
        first(S, VECTORS_T, index + 10)
    with pytest.raises(LaminaError, match="needs 'index' in the batch: wrap the data set in `indexed`"):
        first(S, VECTORS_T)
    with pytest.raises(ShapeError, match=r"embeds 5 features, got \(7, 9\)"):
        first(VECTORS_T, VECTORS_T, index)


SAME = {
    "knowledge_distillation": T,
    "logit_standardization": (T, {"alpha": 0.0}),
    "dist": T,
    "streamlined_instance": T,
    "streamlined_direction": T,
    "hint": EARLY_T,
    "attention_transfer": EARLY_T,
    "activation_boundary": 3 * EARLY_T.sign(),
    "inter_channel_correlation": EARLY_T,
    "affinity": EARLY_T,
    "probabilistic_knowledge_transfer": T,
    "relational_kd": T,
    "correlation_congruence": UNIT_T,
    "similarity_preserving": T,
}


@pytest.mark.parametrize("name", SAME)
def test_a_loss_is_nothing_where_student_and_teacher_agree_and_has_a_finite_gradient_there(name):
    tensor, options = SAME[name] if isinstance(SAME[name], tuple) else (SAME[name], {})
    leaf = tensor.clone().requires_grad_()
    loss = d.LOSSES[name](**options)(leaf, tensor)
    loss.backward()
    assert abs(loss.item()) < 2e-6
    assert torch.isfinite(leaf.grad).all()


def test_losses_of_several_tensors_are_nothing_where_both_agree():
    leaves = [EARLY_T.clone().requires_grad_(), LATE_T.clone().requires_grad_()]
    loss = d.FlowOfSolution()(leaves, [EARLY_T, LATE_T])
    loss.backward()
    assert loss == 0
    assert all(torch.isfinite(x.grad).all() for x in leaves)
    assert abs(d.DISTPlus()([T, EARLY_T], [T, EARLY_T]).item()) < 1e-6
    logits = [EARLY_T.clone().requires_grad_(), T]
    loss = d.SimpleRepresentation()(logits, [EARLY_T, T])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits[0].grad).all()


def test_the_gradient_of_knowledge_distillation_is_temperature_times_the_gap_of_probabilities():
    leaf = S.clone().requires_grad_()
    d.KnowledgeDistillation(3.0)(leaf, T).backward()
    expected = ((leaf / 3).softmax(1) - (T / 3).softmax(1)) * 3 / 7
    torch.testing.assert_close(leaf.grad, expected)


def test_what_a_loss_does_not_see():
    shuffled = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(normal(5, 5, seed=30))[0]
    distances = d.RelationalKD(1.0, 0.0)
    torch.testing.assert_close(distances(3 * S @ rotation + 1, T), distances(S, T), rtol=1e-4, atol=1e-6)
    for loss in (d.SimilarityPreserving(), d.CorrelationCongruence()):
        torch.testing.assert_close(loss(S[shuffled], T[shuffled]), loss(S, T))
    channels = EARLY_S[:, [2, 0, 3, 1]]
    torch.testing.assert_close(d.AttentionTransfer()(channels, WIDE_T), d.AttentionTransfer()(EARLY_S, WIDE_T))
    standard = d.LogitStandardization(alpha=0.0)
    torch.testing.assert_close(standard(2.5 * S + 4, T), standard(S, T), rtol=1e-4, atol=1e-6)
    probabilities = S.softmax(1)
    rows = torch.rand(7, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    affine = d.logit_losses.pearson_distance(rows * probabilities + rows, T.softmax(1))
    torch.testing.assert_close(affine, d.logit_losses.pearson_distance(probabilities, T.softmax(1)))


# Said by torch to itself: its compiler makes an instance.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_activity_has_the_slopes_and_curvatures_of_what_it_says_also_compiled_and_by_rows():
    x = normal(3, 4, 2, 5, seed=31).double().requires_grad_()
    plain = F.normalize(x.square().mean(1).flatten(1))
    torch.testing.assert_close(activity(x), plain)
    assert torch.autograd.gradcheck(activity, x)
    assert torch.autograd.gradgradcheck(activity, x)
    weight = normal(3, 10, seed=32).double()
    expected = torch.autograd.grad((plain * weight).sum(), x)[0]
    compiled = torch.compile(activity, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad((compiled(x) * weight).sum(), x)[0], expected)
    rows = torch.func.vmap(torch.func.grad(lambda r, w: (activity(r[None])[0] * w).sum()))(x.detach(), weight)
    torch.testing.assert_close(rows, expected)


def test_similarity_and_affinity_by_the_matrices_that_they_are_made_of():
    gram_s, gram_t = (F.normalize(x.flatten(1) @ x.flatten(1).T) for x in (EARLY_S, WIDE_T))
    torch.testing.assert_close(d.SimilarityPreserving()(EARLY_S, WIDE_T), (gram_s - gram_t).square().sum() / 49)
    total = 0.0
    for row in range(7):
        for channel in range(4):
            outer = [torch.outer(F.normalize(x[row, channel].flatten(), dim=0), F.normalize(x[row, channel].flatten(), dim=0)) for x in (EARLY_S, EARLY_T)]  # fmt: skip  # noqa: E501
            total += (outer[0] - outer[1]).norm() / 25 / 7
    torch.testing.assert_close(d.Affinity()(EARLY_S, EARLY_T), total)
    # Nearly equal maps: the difference of two matrices would be rounding alone.
    near = EARLY_T.double() + 1e-6 * EARLY_S.double()
    exact = d.Affinity()(near, EARLY_T.double())
    torch.testing.assert_close(d.Affinity()(near.float(), EARLY_T).double(), exact, rtol=0.2, atol=0.0)


def test_small_cases_by_hand():
    assert d.ActivationBoundary(1.0)(torch.tensor([[2.0, -3.0]]), torch.tensor([[-1.0, 1.0]])) == 9 + 16
    torch.testing.assert_close(activity(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])), torch.tensor([[9.0, 16.0]]) / math.hypot(9, 16))  # fmt: skip  # noqa: E501
    scores = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
    # Right, wrong by two ranks, wrong by one, wrong by one: half of three wrong ones is one.
    assert least_error(scores, torch.tensor([0, 0, 1, 0]), 0.5).tolist() == [0, 2]
    torch.testing.assert_close(soft_divergence(S, S + 2, 2.0), torch.zeros(7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [2, 7, 63])
def test_bfloat16_features_give_nearly_the_same_and_any_number_of_rows_goes(rows):
    s, t = normal(rows, 4, 3, 3, seed=40), normal(rows, 4, 3, 3, seed=41)
    for name in ("hint", "attention_transfer", "similarity_preserving", "inter_channel_correlation", "relational_kd"):
        term = d.terms.make_term({"name": name, "student": "a"})
        place = term.student[0]
        exact = term({place: s}, {place: t}, {}, None)
        rough = term({place: s.bfloat16()}, {place: t.bfloat16()}, {}, None)
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, exact, rtol=0.05, atol=1e-3)


def test_factor_transfer_trains_the_paraphraser_first_and_leaves_it_then():
    torch.manual_seed(0)
    loss = d.FactorTransfer(4, 9, pretrain=0.5)
    loss.set_progress(0.2)
    leaf = EARLY_S.clone().requires_grad_()
    loss(leaf, WIDE_T).backward()
    assert leaf.grad is None
    assert loss.paraphraser[0].weight.grad.abs().sum() > 0
    loss.zero_grad()
    loss.set_progress(0.6)
    state = {k: v.clone() for k, v in loss.paraphraser.state_dict().items()}
    loss.train()
    loss(leaf, WIDE_T).backward()
    assert leaf.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.paraphraser.parameters())
    assert all(torch.equal(v, state[k]) for k, v in loss.paraphraser.state_dict().items())


def test_variational_information_and_review_bring_the_student_to_the_teacher():
    torch.manual_seed(0)
    review = d.KnowledgeReview([4, 6], [4, 6], width=8)
    cases = [
        (d.VariationalInformation(4, 9), EARLY_S, WIDE_T),
        (d.PredictionWithUncertainty(5), S, T),
        (d.CorrelationCongruence(student_features=5, teacher_features=9, width=4), S, VECTORS_T),
        (review, [EARLY_S, LATE_S], [EARLY_T, LATE_T]),
    ]
    for loss, student, teacher in cases:
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.03)
        values = []
        for _ in range(30):
            optimizer.zero_grad()
            values.append(loss(student, teacher))
            values[-1].backward()
            optimizer.step()
        assert values[-1] < 0.9 * values[0], type(loss).__name__
    spread = d.VariationalInformation(4, 9, variance=3.0)
    torch.testing.assert_close(F.softplus(spread.spread) + spread.eps, torch.full((9,), 3.0))


def test_self_supervision_asks_for_whole_groups_and_leaves_images_without_rotations_as_distillation():
    torch.manual_seed(0)
    loss = d.SelfSupervisionKD(5, 9, width=4, pretrain=0.5)
    features, logits, labels = normal(8, 5, seed=1), normal(8, 3, seed=2), torch.arange(8) % 3
    theirs = [normal(8, 9, seed=3), normal(8, 3, seed=4)]
    turns = torch.arange(4).repeat(2)
    told = loss([features, logits], theirs, labels, turns)
    told.backward()
    assert loss.student_head[0].weight.grad is None
    assert loss.teacher_head[0].weight.grad.abs().sum() > 0
    loss.zero_grad()
    loss.set_progress(0.7)
    loss([features, logits], theirs, labels, turns).backward()
    assert loss.student_head[0].weight.grad.abs().sum() > 0
    assert loss.teacher_head[0].weight.grad is None
    plain = F.cross_entropy(logits, labels) + 0.9 * soft_divergence(logits, theirs[1], 4.0).mean()
    torch.testing.assert_close(loss([features, logits], theirs, labels), plain)
    with pytest.raises(ShapeError, match="in groups of four; got rotations"):
        loss([features, logits], theirs, labels, turns.roll(1))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: d.KnowledgeDistillation(0.0), "temperature must be > 0, got 0.0"),
        (lambda: d.KnowledgeDistillation(alpha=1.5), r"alpha must be in 0\.\.1, got 1.5"),
        (lambda: d.Hint("max"), "reduction must be 'mean' or 'sum', got 'max'"),
        (lambda: d.AttentionTransfer("maps"), "mode must be 'code' or 'paper'"),
        (lambda: d.ActivationBoundary(0.0), "margin must be > 0"),
        (lambda: d.RelationalKD(0.0, 0.0), "not both 0"),
        (lambda: d.SimilarityPreserving(3), "row_norm must be 1 or 2, got 3"),
        (lambda: d.CorrelationCongruence(order=0), "order >= 1"),
        (lambda: d.CorrelationCongruence(student_features=4), "give student_features and teacher_features, or neither"),
        (lambda: d.StreamlinedDirection(0.0), "tikhonov must be above 0"),
        (lambda: d.SimpleRepresentation(0.0), "exponent must be > 0"),
        (lambda: d.FactorTransfer(4, 4, ratio=0.0), "ratio must be > 0"),
        (lambda: d.VariationalInformation(4, 4, variance=0.0), "variance above eps"),
        (lambda: d.KnowledgeReview([4], [4, 4]), "name one map each"),
        (lambda: d.ContrastiveRepresentation(0, 4, 4), "must be at least 1"),
        (lambda: d.SelfSupervisionKD(4, 4, weights=(1.0, 1.0, 1.0)), "weights must be four numbers"),
        (lambda: d.TeacherEnsemble([]), "needs at least one"),
    ],
)
def test_bad_numbers_are_refused(make, sentence):
    with pytest.raises(LaminaError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: d.Hint()(EARLY_S, WIDE_T),
            r"\(7, 4, 5, 5\) of the student and \(7, 9, 5, 5\) of the teacher; `adapter: \[4, 9\]`",
        ),
        (lambda: d.KnowledgeDistillation()(S, VECTORS_T), r"got \(7, 5\) of the student and \(7, 9\)"),
        (lambda: d.AttentionTransfer()(S, T), r"compares maps .* got \(7, 5\)"),
        (lambda: d.AttentionTransfer()(EARLY_S, LATE_T), r"got \(7, 4, 5, 5\) of the student and \(7, 6, 3, 3\)"),
        (lambda: d.RelationalKD()(S[:1], T[:1]), "rows of a batch are compared with each other, and this one has 1"),
        (lambda: d.FlowOfSolution()(EARLY_S, EARLY_T), r"takes 2 tensors a side \(an early and a late map\), got 1"),
        (lambda: d.PredictionWithUncertainty(6)(S, T), r"features is 6, the student has \(7, 5\)"),
        (lambda: d.VariationalInformation(6, 4)(EARLY_S, EARLY_T), r"a map of 6 channels got \(7, 4, 5, 5\)"),
        (lambda: d.TeacherEnsemble([nn.Linear(5, 2), nn.Linear(5, 3)])(S), r"logits differ: \(7, 2\), \(7, 3\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(call, sentence):
    with pytest.raises(ShapeError, match=sentence):
        call()


def test_a_cross_entropy_without_labels_is_refused():
    with pytest.raises(LaminaError, match="weight for the cross-entropy, but the batch has no labels"):
        d.KnowledgeDistillation(alpha=0.5)(S, T)
