from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamina import cli
from lamina.errors import LaminaError, ShapeError
from lamina.io import save
from lamina.models import ResNet
from lamina.verify import LinearInterpreter, explain


class Head(nn.Module):
    """For the command: a module by its path."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)).eval()


def test_the_page_and_its_arrays_are_those_of_the_interpreter(tmp_path: Path) -> None:
    model, x = conv_net(), torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    page = explain(model, x, tmp_path / "shown", outputs=[3, 1], svd=2, count=2, title="<b>odd</b>")
    text, system = page.read_text(encoding="utf-8"), LinearInterpreter(model, x)
    arrays = {p.stem: torch.from_numpy(np.load(p)) for p in page.parent.glob("*.npy")}
    torch.testing.assert_close(arrays["rows"], torch.cat([system.row(3), system.row(1)]))
    torch.testing.assert_close(arrays["votes"], torch.cat([system.contributions(3), system.contributions(1)]))
    strongest = system.contributions(3).abs().flatten().topk(2).indices.tolist()
    torch.testing.assert_close(arrays["columns"], torch.cat([system.column(j) for j in strongest]))
    torch.testing.assert_close(arrays["singular_values"].float(), torch.linalg.svdvals(system.matrix())[:2])
    assert arrays["left"].shape == (2, 5)
    assert arrays["right"].shape == (2, 1, 6, 6)
    torch.testing.assert_close(arrays["bias"], system.bias[0])
    assert {p.stem for p in page.parent.glob("*.png")} == {"input", "rows", "columns", "singular"}
    # The shares add up, the page needs no other file, and a title is text.
    cells = re.findall(r"<tr><td>3</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", text)
    value, moved, rest, share = (float(c) for c in cells[0])
    assert moved + rest == pytest.approx(value, abs=2e-3)
    assert share == pytest.approx(rest / value, rel=1e-2)
    assert value == pytest.approx(float(system.output[0, 3]), rel=1e-3)
    assert "<td>1 (ReLU)</td><td>relu</td><td>1</td>" in text
    assert "&lt;b&gt;odd" in text
    assert "src=" not in text.replace('src="data:image/png;base64', "")


@pytest.mark.parametrize(
    ("of_model", "of_arrays"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_arrays_keep_the_precision_of_the_model(of_model: str, of_arrays: str, tmp_path: Path) -> None:
    dtype = getattr(torch, of_model)
    explain(conv_net().to(dtype), torch.rand(1, 1, 6, 6, dtype=dtype), tmp_path)
    assert {np.load(p).dtype for p in tmp_path.glob("*.npy")} == {np.dtype(of_arrays)}


@pytest.mark.parametrize(("shown", "computed"), [((True, True), 3), ((False, True), 1), ((False, False), 0)])
def test_only_rows_that_are_read_are_computed(
    shown: tuple[bool, bool], computed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    row = LinearInterpreter.row
    monkeypatch.setattr(LinearInterpreter, "row", lambda self, i: asked.append(i) or row(self, i))
    explain(conv_net(), torch.rand(1, 1, 6, 6), tmp_path, rows=shown[0], columns=shown[1])
    assert len(asked) == computed


def test_of_an_image_the_middle_an_edge_and_a_flat_place_are_shown(tmp_path: Path) -> None:
    x = torch.zeros(1, 1, 12, 12)
    x[..., 8:] = 1.0
    explain(nn.Conv2d(1, 1, 1).eval(), x, tmp_path, columns=False)
    rows = torch.from_numpy(np.load(tmp_path / "rows.npy"))
    middle, edge, flat = (divmod(int(row.abs().argmax()), 12) for row in rows)
    assert middle == (6, 6)
    assert edge[1] in (7, 8)
    assert flat[1] not in (7, 8)
    assert not (tmp_path / "columns.npy").exists()


def test_bad_input_of_the_page(tmp_path: Path) -> None:
    x = torch.zeros(1, 1, 6, 6)
    with pytest.raises(ShapeError, match=r"outputs must be among 0\.\.4, got \[7\]"):
        explain(conv_net(), x, tmp_path / "no", outputs=[7])
    with pytest.raises(LaminaError, match="count must be at least 1 and svd at least 0, got 0 and 0"):
        explain(conv_net(), x, tmp_path / "no", count=0)
    assert not (tmp_path / "no").exists()


def picture(path: Path, channels: int = 3) -> Path:
    images = pytest.importorskip("PIL.Image")
    pixels = np.arange(12 * 10 * channels, dtype=np.uint8).reshape(12, 10, channels)
    images.fromarray(pixels if channels == 3 else pixels[..., 0]).save(path)
    return path


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([str(w) for w in words])
    assert end.value.code == 0


def test_the_command_explains_a_saved_model_on_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ResNet((1,), (4,), stem="small", channels=3, classes=3).eval()
    save(model, tmp_path / "model")
    run("explain", tmp_path / "model", picture(tmp_path / "a.png"), "--size", 8, "--output", 2, "--svd", 1, "--rows")
    assert capsys.readouterr().out.strip() == str(Path("explain", "explain.html"))
    x = torch.from_numpy(np.load(tmp_path / "explain" / "input.npy"))
    assert x.shape == (3, 8, 8)
    assert -1 <= float(x.min()) < -0.5
    assert x.max() <= 1
    rows = torch.from_numpy(np.load(tmp_path / "explain" / "rows.npy"))
    # With singular triples everything is computed, and kept, in float64.
    torch.testing.assert_close(rows, LinearInterpreter(model.double(), x[None]).row(2), rtol=1e-12, atol=1e-14)
    assert (tmp_path / "explain" / "left.npy").exists()
    assert not (tmp_path / "explain" / "columns.npy").exists()
    # Without a word about what to show: all of it.
    run("explain", tmp_path / "model", tmp_path / "a.png", "--size", 8, "--out", tmp_path / "all")
    assert {p.stem for p in (tmp_path / "all").glob("*.png")} == {"input", "rows", "columns"}
    # A folder may say how its model wants its pictures.
    said = {"size": {"height": 6, "width": 6}, "image_mean": [0.0, 0.0, 0.0], "image_std": [2.0, 2.0, 2.0]}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    run("explain", tmp_path / "model", tmp_path / "a.png", "--out", tmp_path / "second", "--rows")
    x = torch.from_numpy(np.load(tmp_path / "second" / "input.npy"))
    assert x.shape == (3, 6, 6)
    assert float(x.min()) >= 0
    assert x.max() <= 0.5


def test_the_command_takes_arrays_data_sets_and_models_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.arange(6, dtype=np.float32))
    run("explain", f"{__name__}:Head", "x.npy", "--rows")
    assert np.load("explain/input.npy").tolist() == list(range(6))
    pytest.importorskip("sklearn")
    node = "{name: resnet, depths: [1], widths: [4], stem: small}"
    run("explain", node, "digits:7", "--out", "digit", "--rows", "--rule", "tangent")
    from lamina.data import digits

    expected = digits().evaluation.batch(torch.tensor([7]))["pixel_values"][0]  # type: ignore[union-attr]
    torch.testing.assert_close(torch.from_numpy(np.load("digit/input.npy")), expected)
    for words, sentence in (
        ((node, "nothing.png"), "no input at nothing.png: no such file"),
        ((node, "digits:9999"), "digits has 359 examples, there is no number 9999"),
        ((node, "digist"), "did you mean 'digits'"),
        ((node, "digits", "--rule", "scant"), "did you mean 'secant'"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["explain", *words])
        assert end.value.code == 2
        assert sentence in capsys.readouterr().err
    np.save("wide.npy", np.zeros((2, 2, 1, 8, 8), dtype=np.float32))
    with pytest.raises(SystemExit):
        cli.main(["explain", "{name: resnet, depths: [1], widths: [4], channels: 1, classes: 2}", "wide.npy"])
    assert "takes inputs of 4 dimensions, the array has shape (2, 2, 1, 8, 8)" in capsys.readouterr().err


def test_a_language_model_is_explained_from_its_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("to be or not to be " * 40, encoding="utf-8")
    sizes = "hidden_size: 8, intermediate_size: 12, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 256"
    node = f"{{name: hugging_face, config: {{model_type: llama, architectures: [LlamaForCausalLM], {sizes}}}}}"
    run("explain", node, "{name: text, source: words.txt, context: 5, batch: 1}", "--rows", "--count", 1)
    assert np.load("explain/input.npy").shape == (5, 8)
