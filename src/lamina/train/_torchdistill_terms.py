"""Losses of a torchdistill configuration as terms of a distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lamina.registry import snake_case

Options = Mapping[str, Any]


@dataclass
class Stage:
    """What a stage's losses may need to know of its models, and what was found to have no counterpart."""

    student: Options
    teacher: Options
    lost: list[str] = field(default_factory=list)

    def place(self, path: str, side: str = "output", whose: str = "student") -> str:
        """Return a path as a place: `.` is the prediction, `model.` of a wrapper falls away, adapters their source."""
        if path == ".":
            return ".logits"
        config = self.student if whose == "student" else self.teacher
        if config.get("auxiliary_model_wrapper"):
            path = path.removeprefix("model.")
        order = config.get("sequential") or []
        if path.startswith("+") and path in order:
            path = order[order.index(path) - 1]
        return path if side == "output" else f"{path}:input"

    def adapter(self, path: str) -> list[int] | None:
        """Return the channels of the new layer (`+name`) that a path ends in."""
        made = (self.student.get("adaptations") or {}).get(path.removeprefix("+")) if path.startswith("+") else None
        kwargs = options_of(made or {})
        sizes = [next((kwargs[k] for k in names if k in kwargs), None) for names in _SIZES]
        if made is None or any(s is None for s in sizes):
            return None
        self.lost.append(f"the layer {path!r} ({kind_of(made)}): a linear map of the channels stands for it; its norm and activation are left out")  # fmt: skip  # noqa: E501
        return [int(s) for s in sizes if s is not None]

    def wrapper(self, whose: str, *names: str) -> Any:
        """Look up an option inside the auxiliary model of one side; None where it is not."""
        value: Any = options_of((self.student if whose == "student" else self.teacher).get("auxiliary_model_wrapper") or {})  # fmt: skip  # noqa: E501
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


_SIZES = (("num_input_channels", "in_channels", "in_features"), ("num_output_channels", "out_channels", "out_features"))


def kind_of(node: Options) -> str:
    """Return what a node names, in the newer and the older spelling."""
    return str(node.get("key") or node.get("type") or node.get("name") or "")


def options_of(node: Options) -> dict[str, Any]:
    """Return a node's arguments, in the newer and the older spelling."""
    return dict(node.get("kwargs") or node.get("params") or {})


def weight_of(node: Options) -> float:
    """Return a node's weight, in the newer and the older spelling."""
    weight = node.get("weight", node.get("factor", 1.0))
    return 1.0 if weight is None or isinstance(weight, Mapping) else float(weight)


def terms_of(criterion: Options, stage: Stage, name: str, weight: float, wrapper: Options) -> list[dict[str, Any]]:
    """Return the terms of one loss; what cannot be said is noted in the stage."""
    kind, options = kind_of(criterion), options_of(criterion)
    options.pop("reduction", None) if kind not in ("MSELoss", "L1Loss", "SmoothL1Loss") else None
    if kind in CONVERTERS:
        found = CONVERTERS[kind](options, stage)
    elif wrapper:
        found = [_simple(kind, options, options_of(wrapper), stage)]
    else:
        stage.lost.append(f"the loss {name!r} ({kind}): no counterpart; a loss of your own is a term `name: module:Class`")  # fmt: skip  # noqa: E501
        return []
    return [{**t, "weight": weight * t.get("weight", 1.0)} for t in found]


def _simple(kind: str, options: dict[str, Any], paths: Options, stage: Stage) -> dict[str, Any]:
    """Convert a loss of torch between two places."""
    source, goal = paths["input"], paths.get("target") or {}
    sides = {"teacher" if s.get("is_from_teacher") else "student": s for s in (source, goal) if s}
    if set(sides) != {"student", "teacher"}:
        stage.lost.append(f"{kind} between two places of one model: compared with the teacher's place of that name")
        sides = {"student": source, "teacher": source}
    ours, theirs = sides["student"], sides["teacher"]
    term: dict[str, Any] = {"name": "hint" if kind == "MSELoss" else f"torch.nn:{kind.rpartition('.')[2]}", **options}
    term["student"] = stage.place(ours["module_path"], ours.get("io", "output"))
    term["teacher"] = stage.place(theirs["module_path"], theirs.get("io", "output"), "teacher")
    adapter = stage.adapter(ours["module_path"])
    return term | ({"adapter": adapter} if adapter else {})


def _logits(name: str, rename: Mapping[str, str]) -> Callable[[Options, Stage], list[dict[str, Any]]]:
    def convert(options: Options, stage: Stage) -> list[dict[str, Any]]:
        term: dict[str, Any] = {"name": name}
        term |= {ours: options[theirs] for theirs, ours in rename.items() if options.get(theirs) is not None}
        return [term | _places(options, stage)]

    return convert


def _places(options: Options, stage: Stage) -> dict[str, str]:
    """Return the two places of a loss that names them itself; nothing where they are the predictions."""
    found = {}
    for side in ("student", "teacher"):
        stems = ("module", "output", "linear", "embed_module")
        path = next((options[f"{side}_{s}_path"] for s in stems if f"{side}_{s}_path" in options), ".")
        found[side] = stage.place(path, options.get(f"{side}_module_io", "output"), side)
    return {} if set(found.values()) == {".logits"} else found


def _distillation(options: Options, stage: Stage) -> list[dict[str, Any]]:
    term: dict[str, Any] = {"name": "knowledge_distillation", "temperature": float(options.get("temperature", 1.0))}
    if options.get("alpha"):
        term["alpha"] = float(options["alpha"])
        term |= {"beta": float(options["beta"])} if options.get("beta") is not None else {}
    else:
        term["scale"] = False
    return [term | _places(options, stage)]


def _pairs(name: str, key: str, rename: Mapping[str, str]) -> Callable[[Options, Stage], list[dict[str, Any]]]:
    def convert(options: Options, stage: Stage) -> list[dict[str, Any]]:
        own = {ours: options[theirs] for theirs, ours in rename.items() if theirs in options}
        terms = []
        for pair in (options.get(key) or {}).values():
            sides = {w: stage.place(pair[w]["path"], pair[w].get("io", "output"), w) for w in ("student", "teacher")}
            terms.append({"name": name, **own, **sides, "weight": weight_of(pair)})
        return terms

    return convert


def _flow(options: Options, stage: Stage) -> list[dict[str, Any]]:
    terms = []
    for pair in (options.get("fsp_pairs") or {}).values():
        term: dict[str, Any] = {"name": "flow_of_solution", "weight": weight_of(pair)}
        for side in ("student", "teacher"):
            ends = [pair[f"{side}_{end}"] for end in ("first", "second")]
            term[side] = [stage.place(e["path"], e.get("io", "output"), side) for e in ends]
        terms.append(term)
    return terms


def _congruence(options: Options, stage: Stage) -> list[dict[str, Any]]:
    kernel = options.get("kernel_config") or options.get("kernel_params") or {}
    term: dict[str, Any] = {"name": "correlation_congruence", "kernel": kernel.get("type") or kernel.get("key")}
    term |= {ours: kernel[theirs] for theirs, ours in (("gamma", "gamma"), ("max_p", "order")) if theirs in kernel}
    for side in ("student", "teacher"):
        term[side] = _source(stage, side)
        term[f"{side}_features"] = stage.wrapper(side, "linear_kwargs", "in_features")
    width = stage.wrapper("student", "linear_kwargs", "out_features")
    return [term | ({"width": width} if width else {})]


def _source(stage: Stage, side: str) -> str | None:
    """Return the place that an auxiliary model of one side reads."""
    module = stage.wrapper(side, "input_module")
    return stage.place(module["path"], module.get("io", "output"), side) if isinstance(module, Mapping) else None


def _contrast(options: Options, stage: Stage) -> list[dict[str, Any]]:
    term = {
        "name": "contrastive_representation",
        "rows": options.get("num_samples"),
        "width": options.get("input_size"),
    }
    term |= {"negatives": options.get("num_negative_samples")}
    term |= {k: options[k] for k in ("temperature", "momentum", "eps") if k in options}
    for side in ("student", "teacher"):
        term[side] = _source(stage, side) or _hooked(stage, side)
        term[f"{side}_features"] = stage.wrapper(side, "linear_kwargs", "in_features") or stage.wrapper(side, "linear", "in_features")  # fmt: skip  # noqa: E501
    return [term]


def _hooked(stage: Stage, side: str) -> str | None:
    config = stage.student if side == "student" else stage.teacher
    found = (config.get("forward_hook") or {}).get("output") or []
    return stage.place(found[0], "output", side) if found else None


def _several(name: str, places: tuple[str, ...], rename: Mapping[str, str]) -> Callable[[Options, Stage], list[dict[str, Any]]]:  # fmt: skip  # noqa: E501
    """Convert a loss of several tensors a side, whose options are called `student_<place>_module_path`."""

    def convert(options: Options, stage: Stage) -> list[dict[str, Any]]:
        term: dict[str, Any] = {"name": name, **{o: options[t] for t, o in rename.items() if t in options}}
        for side in ("student", "teacher"):
            stems = [f"{side}_{p}_module" for p in places]
            term[side] = [stage.place(options[f"{s}_path"], options.get(f"{s}_io", "output"), side) for s in stems]
        return [term]

    return convert


def _with_heads(name: str, *sizes: str) -> Callable[[Options, Stage], list[dict[str, Any]]]:
    """Convert a loss whose heads an auxiliary model held: where they read is known, their sizes must be written in."""

    def convert(options: Options, stage: Stage) -> list[dict[str, Any]]:
        stage.lost.append(f"the heads of {name}: write {', '.join(sizes)} of the features that they read")
        places = {side: _source(stage, side) or _hooked(stage, side) for side in ("student", "teacher")}
        return [{"name": name, **{s: v for s, v in places.items() if v}}]

    return convert


def _prepared(options: Options, stage: Stage) -> list[dict[str, Any]]:
    stage.lost.append("the stage that prepares a head (AuxSSKDLoss): `self_supervision_kd` begins with it (`pretrain`)")
    return []


def _relational(options: Options, stage: Stage) -> list[dict[str, Any]]:
    weights = {ours: float(options.get(theirs) or 0.0) for theirs, ours in (("dist_factor", "distance"), ("angle_factor", "angle"))}  # fmt: skip  # noqa: E501
    return [{"name": "relational_kd", **weights, **_places(options, stage)}]


def _similarity(options: Options, stage: Stage) -> list[dict[str, Any]]:
    # What the package computes, not what the paper says.
    return [{"name": "similarity_preserving", "row_norm": 1, **_places(options, stage)}]


_LOGIT_OPTIONS = {"temperature": "temperature", "alpha": "alpha", "beta": "beta", "eps": "eps"}
_CHANNELS = ("student_channels", "teacher_channels")
_SRD = {"exponent": "exponent", "temperature": "temperature"}
_DIST = {"beta": "beta", "gamma": "gamma", "tau": "temperature", "eps": "eps"}

CONVERTERS: dict[str, Callable[[Options, Stage], list[dict[str, Any]]]] = {
    "KDLoss": _distillation,
    "KDLoss4Transformer": _distillation,
    "AuxSSKDLoss": _prepared,
    "LogitStdKDLoss": _logits("logit_standardization", _LOGIT_OPTIONS),
    "DISTLoss": _logits("dist", _DIST),
    "SKDInstanceLoss": _logits("streamlined_instance", {"temperature": "temperature"}),
    "SKDDirectionLoss": _logits("streamlined_direction", {"tikhonov": "tikhonov"}),
    "PKTLoss": _logits("probabilistic_knowledge_transfer", {"eps": "eps"}),
    "AffinityLoss": _logits("affinity", {}),
    "RKDLoss": _relational,
    "SPKDLoss": _similarity,
    "ATLoss": _pairs("attention_transfer", "at_pairs", {"mode": "mode"}),
    "AltActTransferLoss": _pairs("activation_boundary", "feature_pairs", {"margin": "margin"}),
    "ChSimLoss": _pairs("inter_channel_correlation", "feature_pairs", {}),
    "FSPLoss": _flow,
    "CCKDLoss": _congruence,
    "CRDLoss": _contrast,
    "SRDLoss": _several("simple_representation", ("feature", "linear"), _SRD),
    "DISTPlusLoss": _several("dist_plus", ("logit", "feature"), {**_DIST, "iota": "iota", "kappa": "kappa"}),
    "FTLoss": _with_heads("factor_transfer", *_CHANNELS),
    "KTALoss": _with_heads("factor_transfer", *_CHANNELS),
    "VIDLoss": _with_heads("variational_information", *_CHANNELS),
    "PADL2Loss": _with_heads("prediction_with_uncertainty", "features"),
    "HierarchicalContextLoss": _with_heads("knowledge_review", "student", "teacher", *_CHANNELS),
    "SSKDLoss": _with_heads("self_supervision_kd", "student_features", "teacher_features"),
}  # fmt: skip
"""torchdistill's losses, by class; those of torch itself are taken by the wrapper that names their places."""


def low_level_name(kind: str) -> str:
    """Return how the name of a part of torch stands in a recipe: `AdamW` is `adamw`."""
    return snake_case(kind.rpartition(".")[2]).replace("_", "")
