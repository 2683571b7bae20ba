"""A torchdistill configuration as recipes, one a stage, with a list of what has no counterpart.

The file is read as data: its tags (`!import_call`, `!join`, ...) are looked at, and nothing in it is imported or run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lamina.errors import LaminaError
from lamina.recipe._yaml import scalar, write
from lamina.train._torchdistill_terms import Stage, kind_of, low_level_name, options_of, terms_of, weight_of

ROWS = {"ilsvrc2012": 1_281_167, "cifar10": 50_000, "cifar100": 50_000, "mnist": 60_000, "coco2017": 118_287}
"""Training rows of data sets that torchdistill's own configurations name."""

OPTIMIZERS = frozenset("adadelta adafactor adagrad adam adamax adamw nadam radam rmsprop sgd".split())

FLAT = 1e-6
"""Power of a polynomial that stays at its peak until its last step."""

NOTHING_LOST = frozenset(
    "log_freq num_epochs train_data_loader val_data_loader teacher student optimizer scheduler criterion apex "
    "grad_accum_step max_grad_norm train_batch_size model".split()
)
"""Keys of a stage that are read, or that only steer the other package's loop."""


@dataclass(frozen=True)
class Converted:
    """Recipes, in the order in which they run, and what they do not say."""

    recipes: dict[str, dict[str, Any]]
    """Name of the stage -> recipe, as a mapping."""
    lost: list[str] = field(default_factory=list)
    """One sentence each."""


@dataclass(frozen=True)
class Tagged:
    """A tag of the other language and what stands behind it."""

    tag: str
    value: Any


def show(file: Path, out: Path | None) -> None:
    """Print the recipes, or write them as `<stage>.yaml`, and list what has no counterpart."""
    found = convert(read(file), str(out or "."))
    for name, recipe in found.recipes.items():
        text = f"# From {file.name} of torchdistill, {name}.\n{write(recipe)}"
        if out is None:
            print(text)
            continue
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.yaml").write_text(text, encoding="utf-8")
        print(f"{out / name}.yaml: lamina check {out / name}.yaml")
    print("Without a counterpart:" if found.lost else "Nothing was lost.")
    for sentence in found.lost:
        print(f"- {sentence}")


def read(file: Path) -> Any:
    """Read a configuration; tags become `Tagged` values, `!join` its text.

    Raises:
        LaminaError: no such file, or no YAML.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise LaminaError(f"the configuration {str(file)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise LaminaError(f"{file} is no YAML: {' '.join(str(error).split())}") from error


def convert(config: Any, folder: str = ".") -> Converted:
    """Turn a configuration that was read into recipes.

    Args:
        folder: of the runs, in which a later stage finds the model of the one before.
    Raises:
        LaminaError: it is none of torchdistill's.
    """
    if not isinstance(config, Mapping) or "train" not in config or "models" not in config:
        raise LaminaError("a configuration of torchdistill has the keys `models` and `train`")
    lost: list[str] = []
    train = config["train"]
    stages = {k: v for k, v in train.items() if isinstance(v, Mapping) and k.startswith("stage")} or {"train": train}
    models = config["models"]
    student = models.get("student_model") or models.get("model") or {}
    model, recipes = _model(student, lost), {}
    teacher = _model(models["teacher_model"], lost) if models.get("teacher_model") else None
    known: dict[str, Any] = {}
    for name, stage in stages.items():
        # A stage that does not say it again goes on with what the one before had.
        known = {**known, **stage}
        recipes[name] = _recipe(known, config, model, teacher, lost, name if len(stages) > 1 else "")
        model = {"name": "lamina.io:load", "folder": f"{folder}/runs/{name}/model"}
    if len(stages) > 1:
        names = list(stages)
        lost.append(f"stages: run each with `--folder {folder}/runs/<stage>`, {' then '.join(names)}; a later one loads the model before it")  # fmt: skip  # noqa: E501
    return Converted(recipes, list(dict.fromkeys(lost)))


def _recipe(
    stage: Mapping[str, Any], config: Mapping[str, Any], model: Any, teacher: Any, lost: list[str], name: str
) -> dict[str, Any]:
    where = f" ({name})" if name else ""
    data, batch, rows = _data(stage, config, lost)
    sides = Stage(stage.get("student") or stage.get("model") or {}, stage.get("teacher") or {})
    steps = 1000 if rows is None else max(int(stage.get("num_epochs", 1)) * rows // batch, 1)
    if rows is None:
        lost.append(f"the number of steps{where}: epochs of a data set of unknown size; 1000 is written")
    options: dict[str, Any] = {"steps": steps, "accumulate": int(stage.get("grad_accum_step", 1) or 1)}
    if stage.get("max_grad_norm") is not None:
        options["clip"] = float(stage["max_grad_norm"])
    lost += [f"`{key}`{where}" for key in stage if key not in NOTHING_LOST]
    _sides_lost(sides, where, lost)
    objective = _objective(stage, sides, teacher, lost)
    cache = (stage.get("train_data_loader") or {}).get("cache_output")
    if cache:
        distillations = [o for o in objective if isinstance(o, dict) and o["name"] == "distillation"]
        for one in distillations:
            one["cache"] = str(cache)
        data = {"name": "indexed", "data": data}
    lost += sides.lost
    return {
        "lamina": 1,
        "model": model,
        "data": data,
        "objective": objective,
        "optimizer": _optimizer(stage, where, lost),
        "train": options,
    }


def _objective(stage: Mapping[str, Any], sides: Stage, teacher: Any, lost: list[str]) -> list[Any]:
    criterion = stage.get("criterion") or {}
    parts = options_of(criterion).get("sub_terms") or criterion.get("sub_terms") or {}
    if criterion.get("org_term"):
        parts = {"org_term": criterion["org_term"], **parts}
    if not parts and criterion:
        parts = {"loss": {"criterion": criterion}}
    labels: list[Any] = []
    terms: list[dict[str, Any]] = []
    for name, part in parts.items():
        inner = part.get("criterion") or part
        if not kind_of(inner):
            # An empty term of the older language: the model's own loss, weighed elsewhere.
            lost.append(f"the term {name!r}, which names no loss: name the objective of the task")
            continue
        if kind_of(inner).rpartition(".")[2] == "CrossEntropyLoss":
            labels.append({"name": "classification", "weight": weight_of(part)})
            continue
        older = {"kwargs": part["params"]} if "input" in (part.get("params") or {}) else {}
        terms += terms_of(inner, sides, name, weight_of(part), part.get("criterion_wrapper") or older)
    if options_of(criterion).get("model_term") or stage.get("model_term"):
        lost.append("`model_term`: the loss that the model itself computes; name the objective of the task")
    if not terms:
        return labels or ["classification"]
    distillation: dict[str, Any] = {"name": "distillation", "teacher": teacher, "terms": terms}
    if sides.student.get("frozen_modules"):
        distillation["frozen"] = [sides.place(p) for p in sides.student["frozen_modules"]]
    if sides.student.get("sequential") and not labels:
        distillation["stop"] = True
    return [*labels, distillation]


def _sides_lost(sides: Stage, where: str, lost: list[str]) -> None:
    for whose, side in (("student", sides.student), ("teacher", sides.teacher)):
        if side.get("auxiliary_model_wrapper"):
            lost.append(f"the {whose}'s `auxiliary_model_wrapper` {kind_of(side['auxiliary_model_wrapper'])}{where}: its heads belong to the terms")  # fmt: skip  # noqa: E501
        if whose == "teacher" and side.get("requires_grad"):
            lost.append(f"a teacher that is trained{where}: teachers are frozen, heads of a term are trained")
        if whose == "student" and side.get("requires_grad") is False:
            lost.append(f"a student that is not trained{where}")
        if (side.get("forward_proc") or "forward_batch_only") != "forward_batch_only":
            lost.append(f"the {whose}'s `forward_proc` {side['forward_proc']}{where}: a model is called with the batch")


def _optimizer(stage: Mapping[str, Any], where: str, lost: list[str]) -> dict[str, Any]:
    given = stage.get("optimizer") or {}
    name, options = low_level_name(kind_of(given) or "sgd"), options_of(given)
    # AdamW that leaves norms and biases undecayed, which is what `exclude` says.
    spared = name == "optimizernodecay"
    name = "adamw" if spared else name
    if name not in OPTIMIZERS:
        lost.append(f"the optimizer {kind_of(given)}{where}: sgd is written")
        name = "sgd"
    if given.get("module_wise_params") or given.get("module_wise_kwargs"):
        lost.append(f"rates by module{where}")
    node: dict[str, Any] = {
        "name": name,
        **{k: _plain(v) for k, v in options.items() if not spared or k in ("lr", "weight_decay")},
    }
    node["exclude"] = "norms_and_biases" if spared else "nothing"
    schedule = _schedule(stage, where, lost)
    return node | ({"schedule": schedule} if schedule else {})


def _schedule(stage: Mapping[str, Any], where: str, lost: list[str]) -> Any:
    given = stage.get("scheduler")
    if not given:
        return None
    kind, options, epochs = kind_of(given).rpartition(".")[2], options_of(given), int(stage.get("num_epochs", 1))
    if kind == "MultiStepLR":
        ends = [int(m) for m in options["milestones"] if int(m) < epochs]
        edges, gamma = [0, *ends, epochs], float(options.get("gamma", 0.1))
        pieces = [[(b - a) / epochs, gamma**i, 0.0, FLAT] for i, (a, b) in enumerate(itertools.pairwise(edges))]
        return {"name": "stages", "stages": pieces}
    if kind == "CosineAnnealingLR":
        return {"name": "warmup_cosine", "warmup": 0.0}
    if kind in ("poly_lr_scheduler", "LinearLR", "get_linear_schedule_with_warmup"):
        return {"name": "warmup_linear", "warmup": 0.0}
    lost.append(f"the scheduler {kind}{where}: the rate stays constant")
    return None


def _model(node: Mapping[str, Any], lost: list[str]) -> dict[str, Any]:
    key, options = kind_of(node), {k: _plain(v) for k, v in options_of(node).items()}
    pretrained = options.pop("pretrained", None)
    if pretrained:
        options["weights"] = "DEFAULT"
    if node.get("src_ckpt") or node.get("ckpt"):
        lost.append(f"the checkpoint {node.get('src_ckpt') or node.get('ckpt')} of {key}: load it and `lamina.io.save` the model; `{{name: lamina.io:load, folder: ...}}` then names it")  # fmt: skip  # noqa: E501
    if key.startswith("Auto") or "transformers" in key:
        lost.append(f"the model {key}: name it as {{name: hugging_face, path: ...}}")
        return {"name": "hugging_face", "path": str(options.get("pretrained_model_name_or_path", "PATH"))}
    for name in [k for k, v in options.items() if not isinstance(v, (str, int, float, bool, list, dict, type(None)))]:
        lost.append(f"the option {name!r} of {key}, which is code there")
        del options[name]
    module, _, call = key.rpartition(".")
    return {"name": f"{module or 'torchvision.models'}:{call}", **{k: v for k, v in options.items() if v is not None}}


def _data(
    stage: Mapping[str, Any], config: Mapping[str, Any], lost: list[str]
) -> tuple[dict[str, Any], int, int | None]:
    """Return the data node, the batch, and how many training rows there are, as far as that is known."""
    loader = stage.get("train_data_loader") or {}
    batch = int({**loader, **(loader.get("kwargs") or {})}.get("batch_size", 32))
    named = str(loader.get("dataset_id", "data"))
    short = named.partition("/")[0]
    node: dict[str, Any] = {"name": "images", "source": "FOLDER", "batch": batch}
    for known in ("cifar10", "mnist"):
        if short == known:
            node = {"name": known, "batch": batch}
    if node["name"] == "images":
        source = _find(config.get("datasets") or {}, "root")
        node["source"] = str(source or "FOLDER")
        size = _find(config.get("datasets") or {}, "size")
        node |= {"size": int(size[0] if isinstance(size, list) else size)} if size is not None else {}
        node |= {k: found for k in ("mean", "std") if (found := _find(config.get("datasets") or {}, k)) is not None}
        lost.append(f"the data set {named}: `images` reads a folder with a sub-folder a class; see that it is the one")
    lost.append("transforms of the data set: sizes and normalisation are taken over, random ones are not (`augmented_views`)")  # fmt: skip  # noqa: E501
    return node, batch, ROWS.get(short)


def _find(value: Any, key: str) -> Any:
    """Return the first value of a key, however deep."""
    value = value.value if isinstance(value, Tagged) else value
    if isinstance(value, Mapping):
        if value.get(key) is not None:
            return value[key]
        value = list(value.values())
    if isinstance(value, list):
        return next((found for v in value if (found := _find(v, key)) is not None), None)
    return None


def _plain(value: Any) -> Any:
    """Return a value as YAML says it: `!getattr [x, name]` is the name; other code stays `Tagged`."""
    if isinstance(value, Tagged) and value.tag == "!getattr" and isinstance(value.value, list):
        return str(value.value[-1])
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


class _Loader(yaml.SafeLoader):
    """Reads anchors, and any tag as data."""


def _tagged(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    value: Any
    if isinstance(node, yaml.MappingNode):
        value = loader.construct_mapping(node, deep=True)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = node.value
    if suffix in ("join", "pathjoin") and isinstance(value, list):
        return ("" if suffix == "join" else "/").join(str(v) for v in value)
    return Tagged(f"!{suffix}", value)


def _number(loader: _Loader, node: yaml.Node) -> Any:
    # PyYAML takes `1e-3` for text.
    assert isinstance(node, yaml.ScalarNode)
    return scalar(node.value) if node.style is None else node.value


_Loader.add_multi_constructor("!", _tagged)
_Loader.add_constructor("tag:yaml.org,2002:str", _number)
