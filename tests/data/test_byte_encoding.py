"""Images and sounds as the bytes of files: lengths of the paper, contents that decode to what went in."""

import io
import wave

import numpy as np
import pytest
import torch

from lamina.data import encode, read_sound
from lamina.data.byte_encoding import PIXELS
from lamina.errors import LaminaError, ShapeError

RNG = np.random.default_rng(0)


def test_files_are_as_long_as_the_paper_says_and_a_tiff_holds_the_pixels_in_one_piece():
    pytest.importorskip("PIL")
    image = RNG.integers(0, 256, (224, 224, 3)).astype(np.uint8)
    lengths = {e: len(encode(image, e)) for e in ("fhwc", "fchw", "tiff", "png")}
    assert lengths == {"fhwc": 150_528, "fchw": 150_528, "tiff": 150_668, "png": 150_864}
    assert encode(image, "fhwc") in encode(image, "tiff")
    assert encode(image, "fchw") == image.transpose(2, 0, 1).tobytes()
    assert len(encode(image, "jpeg", quality=100)) > len(encode(image, "jpeg", quality=60))


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (63, 64, 3), (8, 8, 1)])
@pytest.mark.parametrize("encoding", PIXELS)
def test_a_picture_comes_back(shape, encoding):
    pillow = pytest.importorskip("PIL.Image")
    image = RNG.integers(0, 256, shape).astype(np.uint8)
    content = encode(torch.from_numpy(image), encoding)
    if encoding in ("fhwc", "fchw"):
        assert len(content) == image.size
        return
    found = np.asarray(pillow.open(io.BytesIO(content)))
    if encoding != "jpeg":
        assert np.array_equal(found, image.squeeze(-1) if shape[-1] == 1 and len(shape) == 3 else image)
    assert found.shape[:2] == shape[:2]


def test_shares_are_cut_off_to_bytes():
    assert encode(np.array([[0.0, 0.999, 1.0, 0.5]], np.float32), "fhwc") == bytes([0, 254, 255, 127])


@pytest.mark.parametrize(
    ("sample", "width", "error"), [("uint8", 1, 1 / 127), ("int16", 2, 2**-14), ("int32", 4, 1e-7)]
)
def test_a_sound_comes_back_from_pcm(sample, width, error):
    sound = np.sin(np.arange(801) / 7).astype(np.float32)
    content = encode(sound, "wav", rate=8000, sample=sample)
    with wave.open(io.BytesIO(content)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, width, 8000)
    found, rate = read_sound(content)
    assert rate == 8000
    assert np.abs(found - sound).max() <= error
    assert encode(np.array([1.0, -1.0]), "wav", sample="int16")[-4:] == b"\xff\x7f\x01\x80"
    assert encode(np.array([1.0, -1.0]), "wav", sample="uint8")[44:46] == b"\xff\x00"


def test_floating_point_sounds_are_stored_as_they_are():
    scipy = pytest.importorskip("scipy.io.wavfile")
    sound = RNG.uniform(-1, 1, 63).astype(np.float32)
    rate, found = scipy.read(io.BytesIO(encode(sound, "wav", rate=16_000, sample="float32")))
    assert rate == 16_000
    assert np.array_equal(found, sound)


def test_what_cannot_be_encoded_or_read_is_refused():
    image, sound = np.zeros((2, 2), np.uint8), np.zeros(4, np.float32)
    for call, words in (
        (lambda: encode(image, "tif"), "did you mean 'tiff'"),
        (lambda: encode(image, "raw"), "no encoding is called 'raw'"),
        (lambda: encode(image, "png", quality=50), "of JPEG alone"),
        (lambda: encode(image, "jpeg", quality=0), r"1\.\.100"),
        (lambda: encode(image.astype(float) + 2, "fhwc"), "from 0 to 1, got"),
        (lambda: encode(sound + 2, "wav"), "from -1 to 1"),
        (lambda: encode(sound, "wav", sample="int24"), "sample must be one of"),
        (lambda: read_sound(b"RIFF"), "cannot be read as an uncompressed WAV"),
    ):
        with pytest.raises(LaminaError, match=words):
            call()
    for call in (lambda: encode(np.zeros((2, 2, 4), np.uint8), "fhwc"), lambda: encode(image, "wav")):
        with pytest.raises(ShapeError, match="got"):
            call()
