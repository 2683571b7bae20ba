"""Configurations of another package as recipes: read as data, converted, and what has no counterpart named."""

import pytest
import yaml

from lamina.errors import LaminaError
from lamina.objectives import Distillation
from lamina.recipe import check, dump, load
from lamina.train.convert_torchdistill import convert, read, show

FITNET = """
datasets:
  &train cifar10/train: !import_call
    key: 'torchvision.datasets.CIFAR10'
    init: {kwargs: {root: !join ['~/datasets/', cifar10]}}
models:
  teacher_model:
    key: &teacher 'tests.objectives.test_distillation.net'
    _weights: &weights !import_get {key: 'torchvision.models.ResNet152_Weights'}
    kwargs: {width: 9}
  student_model:
    key: 'tests.objectives.test_distillation.net'
    kwargs: {width: 6}
    src_ckpt: !join ['./ckpt/', *teacher, '.pt']
train:
  log_freq: 1000
  stage1:
    num_epochs: 5
    train_data_loader: {dataset_id: *train, kwargs: {batch_size: 100}, cache_output: './cache'}
    teacher: {sequential: ['0', '1', '2'], forward_hook: {input: [], output: ['2']}, requires_grad: False}
    student:
      adaptations:
        convreg: {key: 'ConvReg', kwargs: {num_input_channels: 6, num_output_channels: 9, kernel_size: 1}}
      sequential: ['0', '1', '2', '+convreg']
      frozen_modules: ['0']
      wrapper: 'DistributedDataParallel'
      requires_grad: True
    optimizer: {key: 'Adam', kwargs: {lr: 1e-3}}
    scheduler: {key: 'MultiStepLR', kwargs: {milestones: [3], gamma: 0.1}}
    pre_epoch_process: 'special'
    criterion:
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          middle:
            criterion: {key: 'MSELoss', kwargs: {reduction: 'sum'}}
            criterion_wrapper:
              key: 'SimpleLossWrapper'
              kwargs:
                input: {is_from_teacher: False, module_path: '+convreg', io: 'output'}
                target: {is_from_teacher: True, module_path: '2', io: 'output'}
            weight: 0.5
  stage2:
    num_epochs: 2
    student: {sequential: [], requires_grad: True}
    teacher: {sequential: [], requires_grad: False}
    optimizer: {key: 'Lion', kwargs: {lr: 0.1}}
    scheduler: {key: 'StepLR', kwargs: {step_size: 5}}
    criterion:
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          kd:
            criterion: {key: 'KDLoss', kwargs: {temperature: 3.0, alpha: 0.5, student_module_path: '.', student_module_io: output, teacher_module_path: '.', teacher_module_io: output}}
            weight: 1.0
"""  # fmt: skip  # noqa: E501


def converted(text, tmp_path):
    (tmp_path / "their.yaml").write_text(text)
    return convert(read(tmp_path / "their.yaml"), "work")


def test_two_stages_become_two_recipes_the_second_on_the_model_of_the_first(tmp_path):
    found = converted(FITNET, tmp_path)
    first, second = found.recipes["stage1"], found.recipes["stage2"]
    (objective,) = first["objective"]
    assert objective["terms"] == [
        {"name": "hint", "reduction": "sum", "student": "2", "teacher": "2", "adapter": [6, 9], "weight": 0.5}
    ]
    assert (objective["stop"], objective["frozen"], objective["cache"]) == (True, ["0"], "./cache")
    assert first["data"] == {"name": "indexed", "data": {"name": "cifar10", "batch": 100}}
    assert first["train"] == {"steps": 2500, "accumulate": 1}
    assert first["optimizer"]["lr"] == 1e-3
    assert first["optimizer"]["schedule"]["stages"] == [[0.6, 1.0, 0.0, 1e-6], [0.4, 0.1, 0.0, 1e-6]]
    assert second["model"] == {"name": "lamina.io:load", "folder": "work/runs/stage1/model"}
    assert second["objective"][0]["terms"] == [
        {"name": "knowledge_distillation", "temperature": 3.0, "alpha": 0.5, "weight": 1.0}
    ]
    assert second["train"]["steps"] == 1000
    words = "\n".join(found.lost)
    for expected in ("'+convreg' (ConvReg)", "`pre_epoch_process` (stage1)", "optimizer Lion (stage2)", "StepLR", "./ckpt/tests.objectives"):  # fmt: skip  # noqa: E501
        assert expected in words
    recipe = check(load(first))
    assert check(load(dump(recipe))) == recipe


SIDES = ("student", "teacher")
PAIR = {"a": {side: {"path": "2", "io": "input"} for side in SIDES}}
FLOW = {"a": {f"{s}_{end}": {"path": p, "io": "output"} for s in SIDES for end, p in (("first", "0"), ("second", "2"))}}
TWO = {f"{s}_feature_module_path": "model.2" for s in SIDES} | {f"{s}_linear_module_path": "." for s in SIDES}
SAME = {"student_output_path": "1", "teacher_output_path": "1"}
GAUSS = {"kernel_config": {"type": "gaussian", "gamma": 0.4, "max_p": 2}}

LOSSES = {
    "KDLoss": ({"temperature": 1.0, "alpha": 0}, {"name": "knowledge_distillation", "scale": False}),
    "LogitStdKDLoss": ({"temperature": 2.0, "alpha": 0.1, "beta": 9.0}, {"name": "logit_standardization", "beta": 9.0}),
    "DISTLoss": ({"beta": 1.0, "gamma": 2.0, "tau": 3.0}, {"name": "dist", "gamma": 2.0, "temperature": 3.0}),
    "PKTLoss": ({"student_module_path": "1", "teacher_module_path": "3"}, {"student": "1", "teacher": "3"}),
    "RKDLoss": ({**SAME, "dist_factor": 25, "angle_factor": 0}, {"distance": 25.0, "angle": 0.0, "student": "1"}),
    "SPKDLoss": (SAME, {"name": "similarity_preserving", "row_norm": 1}),
    "ATLoss": ({"mode": "paper", "at_pairs": PAIR}, {"mode": "paper", "student": "2:input"}),
    "AltActTransferLoss": ({"margin": 2.0, "feature_pairs": PAIR}, {"name": "activation_boundary", "margin": 2.0}),
    "FSPLoss": ({"fsp_pairs": FLOW}, {"student": ["0", "2"]}),
    "CCKDLoss": (GAUSS, {"order": 2, "student_features": 6, "width": 4, "student": "1"}),
    "SRDLoss": ({**TWO, "exponent": 4.0}, {"student": ["2", ".logits"], "exponent": 4.0}),
    "CRDLoss": ({"input_size": 8, "num_samples": 20, "num_negative_samples": 4}, {"rows": 20, "width": 8}),
    "FTLoss": ({"p": 1}, {"name": "factor_transfer", "student": "1"}),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_becomes_a_term(kind, tmp_path):
    options, expected = LOSSES[kind]
    config = yaml.safe_load(FITNET.replace("!import_call", "").replace("!import_get", "").replace("!join", ""))
    stage = config["train"].pop("stage2")
    linear = {
        "input_module": {"path": "model.1", "io": "output"},
        "linear_kwargs": {"in_features": 6, "out_features": 4},
    }
    aside = {"auxiliary_model_wrapper": {"key": "Wrapper", "kwargs": linear}}
    stage["student"], stage["teacher"] = aside, aside
    stage["criterion"]["kwargs"]["sub_terms"] = {"one": {"criterion": {"key": kind, "kwargs": options}, "weight": 2.0}}
    config["train"] = stage
    (term,) = convert(config).recipes["train"]["objective"][0]["terms"]
    assert expected.items() <= term.items()
    assert term["weight"] == 2.0
    if kind != "FTLoss":
        # What was converted can be built; heads whose sizes were nowhere cannot, and are in the list.
        Distillation(terms=[term])


def test_labels_become_classification_and_older_spellings_are_read(tmp_path):
    config = {
        "models": {
            "teacher_model": {"name": "resnet34", "params": {"pretrained": True}},
            "student_model": {"name": "resnet18"},
        },
        "train": {
            "num_epochs": 1,
            "train_data_loader": {"dataset_id": "own/train", "batch_size": 8},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "criterion": {
                "type": "GeneralizedCustomLoss",
                "org_term": {"criterion": {"type": "CrossEntropyLoss", "params": {}}, "factor": 0.9},
                "sub_terms": {"own": {"criterion": {"type": "OwnLoss", "params": {}}, "factor": 3.0}},
            },
        },
    }
    found = convert(config)
    assert found.recipes["train"]["objective"] == [{"name": "classification", "weight": 0.9}]
    assert found.recipes["train"]["model"] == {"name": "torchvision.models:resnet18"}
    assert any("'own' (OwnLoss): no counterpart" in sentence for sentence in found.lost)
    assert any("epochs of a data set of unknown size" in sentence for sentence in found.lost)


def test_recipes_are_written_and_the_list_printed(tmp_path, capsys):
    (tmp_path / "their.yaml").write_text(FITNET)
    show(tmp_path / "their.yaml", tmp_path / "ours")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"stage1.yaml", "stage2.yaml"}
    assert "Without a counterpart:\n- " in capsys.readouterr().out
    assert load(tmp_path / "ours" / "stage1.yaml").model["width"] == 6
    show(tmp_path / "their.yaml", None)
    assert "# From their.yaml of torchdistill, stage2." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("models: {}", "has the keys `models` and `train`"),
        ("- 1", "has the keys `models` and `train`"),
        ("a: [", "is no YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_configuration_is_refused(text, sentence, tmp_path):
    if text is not None:
        (tmp_path / "their.yaml").write_text(text)
    with pytest.raises(LaminaError, match=sentence):
        convert(read(tmp_path / "their.yaml"))


def test_nothing_in_a_file_is_run(tmp_path):
    mark = tmp_path / "ran"
    text = f"models: {{student_model: {{key: !!python/object/apply:os.mkdir ['{mark}']}}}}\ntrain: {{}}"
    with pytest.raises(LaminaError, match="is no YAML"):
        converted(text, tmp_path)
    harmless = f"models: {{student_model: {{key: x, kwargs: {{a: !import_call {{key: os.mkdir, init: {{args: ['{mark}']}}}}}}}}}}\ntrain: {{}}"  # fmt: skip  # noqa: E501
    found = converted(harmless, tmp_path)
    assert "the option 'a' of x, which is code there" in found.lost
    assert not mark.exists()
