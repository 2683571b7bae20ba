import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lamina import io
from lamina.errors import LaminaError
from lamina.models import Transformer
from lamina.registry import register
from lamina.rewrite import history, rewrite


@dataclass(frozen=True)
class Widening:
    path: str
    rows: int


class Widen:
    """Test pass: the named linear layer gets more outputs, the old ones stay."""

    version = 1
    preserves = "nothing"

    def __init__(self, path, rows=1):
        self.path, self.rows = path, rows

    def decide(self, model, data=None) -> Widening:
        return Widening(self.path, self.rows)

    def apply(self, model, decision, lineage):
        old = model.get_submodule(decision.path)
        new = nn.Linear(old.in_features, old.out_features + decision.rows, device=old.weight.device)
        with torch.no_grad():
            for name in ("weight", "bias"):
                new.get_parameter(name).zero_()
                new.get_parameter(name)[: old.out_features].copy_(old.get_parameter(name))
                index = [*range(old.out_features), *[-1] * decision.rows]
                lineage.derive(new.get_parameter(name), old.get_parameter(name), index)
        model.set_submodule(decision.path, new)
        return model


@register("model", "io_test_net")
class Net(nn.Module):
    """Test model."""

    def __init__(self, width=4):
        super().__init__()
        self.one = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return self.one(self.norm(x) * self.scale)


INPUTS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Net(6)
    model(INPUTS)  # moves the running statistics
    return io.save(model.eval(), tmp_path / "model"), model


def test_five_rewrites_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model = Net()
    for i in range(5):
        rewrite(model, Widen("one", rows=i + 1))
        with torch.no_grad():
            model.one.weight.add_(0.1)
    assert model.one.out_features == 4 + 15
    folder = io.save(model.eval(), tmp_path / "model")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    other = io.load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(other(INPUTS), model(INPUTS))
    assert history(other) == history(model)
    assert [r.parameters_after - r.parameters_before for r in history(model)] == [4, 8, 12, 16, 20]
    assert not other.training


def test_a_clean_process_gives_the_same_bits(tmp_path):
    torch.manual_seed(0)
    model = Transformer(2, 16, 2, vocabulary=11, context=8).eval()
    tokens = torch.arange(8)[None] % 11
    folder = io.save(model, tmp_path / "model")
    save_file({"expected": model(tokens).detach()}, tmp_path / "expected.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file; import lamina\n"
        "model = lamina.load(sys.argv[1]); want = load_file(sys.argv[2])['expected']\n"
        "sys.exit(0 if torch.equal(model(torch.arange(8)[None] % 11), want) else 3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "expected.safetensors"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    torch.manual_seed(0)
    model = Transformer(1, 16, 2, vocabulary=11, context=8, tie=True).eval()
    folder = io.save(model, tmp_path / "model")
    other = io.load(folder)
    assert len(list(other.parameters())) == len(list(model.parameters()))
    assert torch.equal(other(torch.zeros(1, 3, dtype=torch.long)), model(torch.zeros(1, 3, dtype=torch.long)))


def test_a_hugging_face_folder_stays_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=13, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.arange(9)[None]
    folder = io.save(model, tmp_path / "model")
    ours = io.load(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert torch.equal(ours(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits)
    (folder / io.ARCHITECTURE).unlink()
    assert torch.equal(io.load(folder)(tokens).logits, model(tokens).logits)


def test_dtype_and_buffers_come_back(saved, tmp_path):
    folder, model = saved
    assert torch.equal(io.load(folder)(INPUTS), model(INPUTS))
    half = io.load(io.save(model.bfloat16(), tmp_path / "half"))
    assert half.one.weight.dtype == torch.bfloat16
    assert torch.equal(half.norm.running_mean, model.norm.running_mean)


def test_a_base_is_named_for_a_model_that_does_not_know_it(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with pytest.raises(LaminaError, match=r"Sequential does not know how it was built: pass base="):
        io.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    folder = io.save(model, tmp_path / "model", base="their.module:build")
    with pytest.raises(LaminaError, match=r"their.module:build"):
        io.load(folder)
    assert torch.equal(io.load(folder, base=nn.Sequential(nn.Linear(3, 2)))(INPUTS), model(INPUTS))


def test_an_argument_no_file_can_hold_is_named(tmp_path):
    model = Transformer(1, 16, 2, vocabulary=11, context=8, norm=nn.LayerNorm)
    with pytest.raises(LaminaError, match=r"norm=<class .*LayerNorm.*which no file can hold"):
        io.save(model, tmp_path / "model")


def damage(folder, what):
    weights, description = folder / io.WEIGHTS, folder / io.ARCHITECTURE
    content = json.loads(description.read_text())
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif what == "one bit":
        data = bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(bytes(data))
    elif what == "no weights":
        weights.unlink()
    elif what == "foreign":
        weights.write_bytes(b"\x80\x04K\x01.")
        content["sha256"] = io.digest(weights)
    elif what == "other names":
        save_file({"two.weight": torch.zeros(2)}, weights)
        content["sha256"] = io.digest(weights)
    elif what == "other shape":
        content["base"]["width"] = 7
    elif what == "format":
        content["format"] = 99
    elif what == "unknown pass":
        content["rewrites"] = [
            {"name": "no_such_pass", "version": 1, "decision": {}, "parameters_before": 1, "parameters_after": 1}
        ]
    elif what == "bad record":
        content["rewrites"] = [{"name": "x"}]
    elif what == "more in a record":
        content["rewrites"] = [
            {"name": "x", "version": 1, "decision": {}, "parameters_before": 1, "parameters_after": 1, "more": 1}
        ]
    elif what == "more in a decision":
        decision = {"attention": [], "atention": [1]}
        content["rewrites"] = [
            {
                "name": "drop_attention",
                "version": 1,
                "decision": decision,
                "parameters_before": 1,
                "parameters_after": 1,
            }
        ]
    elif what == "no pass":
        content["rewrites"] = [
            {
                "name": "subprocess:Popen",
                "version": 1,
                "decision": {},
                "parameters_before": 1,
                "parameters_after": 1,
            }
        ]
    elif what == "a number for a sum":
        content["sha256"] = 3
    elif what == "a list":
        content = []
    elif what == "a folder":
        weights.unlink()
        weights.mkdir()
    elif what == "a buffer":
        content["buffers"] = {"one.frequencies": "bfloat16"}
    elif what == "no base":
        del content["base"]
    description.write_text("{" if what == "not json" else json.dumps(content))


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("truncated", "is not the file that was saved"),
        ("one bit", "is not the file that was saved"),
        ("no weights", "has no model.safetensors"),
        ("foreign", "not a readable safetensors file"),
        ("other names", r"missing \['norm.bias', .*unknown \['two.weight'\]"),
        ("other shape", r"one.weight is \(6, 3\) in .* and \(7, 3\) in the model"),
        ("format", "has format 99"),
        ("unknown pass", "no pass is called 'no_such_pass'"),
        ("bad record", "is not a description of a saved model"),
        ("more in a record", "its rewrites have more"),
        ("more in a decision", "it has no 'atention'; did you mean 'attention'"),
        ("no pass", "'subprocess:Popen' is no pass"),
        ("a number for a sum", "is not a description of a saved model: .*should be a valid string$"),
        ("a list", "is not a description of a saved model"),
        ("a folder", "has no model.safetensors"),
        ("a buffer", "had a buffer one.frequencies of type bfloat16"),
        ("no base", "is not a description of a saved model: it has no 'base'"),
        ("not json", "is not a description of a saved model"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason(saved, what, sentence):
    folder, _ = saved
    damage(folder, what)
    with pytest.raises(LaminaError, match=sentence):
        io.load(folder)


def test_nothing_there_and_nothing_of_ours(tmp_path):
    with pytest.raises(LaminaError, match="no such folder"):
        io.load(tmp_path / "nowhere")
    (tmp_path / "pickled").mkdir()
    with pytest.raises(LaminaError, match=r"neither architecture.json nor config.json"):
        io.load(tmp_path / "pickled")
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LaminaError, match=r"pickled weights are never read"):
        io.load(tmp_path / "pickled")


def test_a_failed_save_leaves_the_old_one_and_no_rubbish(saved, monkeypatch):
    folder, model = saved

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        io.save(model, folder)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert torch.equal(io.load(folder)(INPUTS), model(INPUTS))


def test_saving_again_replaces_and_another_folder_is_never_overwritten(saved, tmp_path):
    folder, model = saved
    with torch.no_grad():
        model.one.weight.zero_()
    io.save(model, folder)
    assert io.load(folder).one.weight.abs().sum() == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(LaminaError, match="refusing to replace"):
        io.save(model, tmp_path / "thesis")


def test_weights_on_meta_are_not_saved(tmp_path):
    with torch.device("meta"):
        model = Net()
    with pytest.raises(LaminaError, match="meta"):
        io.save(model, tmp_path / "model")


def bare_function(width: int = 4):
    return Net(width)


def annotated(width: int = 4) -> nn.Module:
    return Net(width)


@pytest.mark.parametrize("node", [{"name": "os:mkdir"}, {"name": "io_test_net", "width": {"name": "os:mkdir"}}])
def test_a_file_cannot_have_just_any_function_called(saved, tmp_path, node):
    folder, model = saved
    description = folder / io.ARCHITECTURE
    content = json.loads(description.read_text())
    content["base"] = node | {"path": str(tmp_path / "made")}
    description.write_text(json.dumps(content))
    with pytest.raises(LaminaError, match=r"os:mkdir is named .* class of nn.Module, or a function annotated"):
        io.load(folder)
    assert not (tmp_path / "made").exists()
    assert torch.equal(io.load(folder, base=Net(6))(INPUTS), model(INPUTS))


def test_a_base_function_says_that_it_makes_a_module(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "their_models", sys.modules[__name__])
    model = Net().eval()
    with pytest.raises(LaminaError, match="their_models:bare_function is named"):
        io.save(model, tmp_path / "model", base="their_models:bare_function")
    for base in ("their_models:annotated", "their_models:Net"):
        assert torch.equal(io.load(io.save(model, tmp_path / "model", base=base))(INPUTS), model(INPUTS))


def test_a_compiled_model_is_saved_as_what_it_wraps(tmp_path):
    model = Net(6).eval()
    folder = io.save(torch.compile(model, backend="eager"), tmp_path / "model")
    assert torch.equal(io.load(folder)(INPUTS), model(INPUTS))


def test_weights_tied_by_their_storage_alone_are_saved(tmp_path):
    model = Net(3).eval()
    model.norm.weight.data = model.scale.data
    assert torch.equal(io.load(io.save(model, tmp_path / "model"))(INPUTS), model(INPUTS))


def test_the_type_of_a_buffer_that_no_file_holds_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes)).eval().bfloat16()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        found = io.load(io.save(model, tmp_path / "model"))(ids).logits
        assert torch.equal(found, model(ids).logits)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [("{", "config.json is not a configuration"), ("[]", "config.json is not a configuration"), ("", "no readable")],
)
def test_a_foreign_folder_that_cannot_be_read_is_refused(tmp_path, config, sentence):
    transformers = pytest.importorskip("transformers")
    whole = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)
    (tmp_path / "config.json").write_text(config or json.dumps(whole.to_dict()))
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(LaminaError, match=sentence):
        io.load(tmp_path)
