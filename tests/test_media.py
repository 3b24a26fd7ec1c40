"""Videos: which frames are taken, what is refused, and the same answer from a file as from its frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from conftest import Case, answers, config_for, run_engine

from mmdist import media
from mmdist.config import SamplingParams, UserError
from mmdist.engine.engine import Engine
from mmdist.media import choose_frames, load_video
from mmdist.tasks.requests import build_request


@pytest.fixture
def video() -> Case:
    return Case("llava_next_video")


def write_video(path: Path, num_frames: int) -> np.ndarray:
    """A lossless film in which frame i is of the grey 10 * i."""
    frames = np.stack([np.full((32, 48, 3), 10 * i, np.uint8) for i in range(num_frames)])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    return frames


def test_frames_are_spread_evenly() -> None:
    assert choose_frames(16, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert choose_frames(10, 4) == np.arange(0, 10, 10 / 4).astype(int).tolist()
    assert choose_frames(3, 8) == [0, 1, 2]


@pytest.mark.parametrize("num_frames", (1, 4, 9, 20))
def test_a_film_gives_its_frames(tmp_path: Path, num_frames: int) -> None:
    frames = write_video(tmp_path / "film.mkv", 9)
    np.save(tmp_path / "film.npy", frames)
    film = load_video(tmp_path / "film.mkv", num_frames)
    assert [int(np.asarray(frame).mean()) for frame in film] == [10 * i for i in choose_frames(9, num_frames)]
    arrays = load_video(tmp_path / "film.npy", num_frames)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(film, arrays, strict=True))


def spoiled(folder: Path) -> dict[str, tuple[Path, str]]:
    write_video(folder / "film.mkv", 9)
    cut = (folder / "film.mkv").read_bytes()
    (folder / "head.mkv").write_bytes(cut[:60])
    (folder / "text.mp4").write_text("no film")
    np.save(folder / "empty.npy", np.zeros((0, 8, 8, 3), np.uint8))
    np.save(folder / "float.npy", np.zeros((2, 8, 8, 3), np.float32))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "broken.npy").write_bytes(b"\x93NUMPY")
    return {
        "missing": (folder / "none.mp4", "no such video"),
        "no frames": (folder / "empty.npy", "a video of 0 frames"),
        "broken container": (folder / "head.mkv", "not a readable video"),
        "no container": (folder / "text.mp4", "not a readable video"),
        "floats": (folder / "float.npy", "expected uint8 (frames, height, width, 3), found float32 (2, 8, 8, 3)"),
        "pickled": (folder / "objects.npy", "not an array of frames"),
        "cut array": (folder / "broken.npy", "not an array of frames"),
    }


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    for path, words in spoiled(tmp_path).values():
        with pytest.raises(UserError) as error:
            load_video(path, 8)
        assert words in str(error.value) and str(path) in str(error.value)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "film.mkv", 2)
    monkeypatch.setattr(media, "HAS_AV", False)
    with pytest.raises(UserError, match=r"pip install 'mmdist\[video\]'"):
        load_video(tmp_path / "film.mkv", 8)


def test_a_request_says_video(video: Case, mistral: Case) -> None:
    """Refusals of a request: pictures beside a video, a placeholder too many, a family that has no video."""

    def work(engine: Engine) -> None:
        clip = video.items["clip"]
        mixed: dict[str, Any] = {"id": "a", "prompt": "<video> <image>", "images": ["banner.png"], "video": "video.npy"}
        for entry, words in (
            (mixed, "pictures or videos, not both"),
            ({"id": "a", "prompt": "<video> and <video>", "video": "video.npy"}, "2 <video> in the prompt, 1 videos"),
            ({"id": "a", "prompt": "nothing", "video": "video.npy"}, "0 <video> in the prompt, 1 videos"),
            ({"id": "a", "messages": clip["messages"]}, "1 <video> in the prompt, 0 videos"),
            ({"id": "a", "prompt": "<video>", "video": 7}, "video: expected a path, found int"),
        ):
            with pytest.raises(UserError) as error:
                build_request(entry, engine.prompts, SamplingParams(), video.folder / "inputs")
            assert words in str(error.value)

    run_engine(1, config_for(video), work)

    def pictures_only(engine: Engine) -> None:
        with pytest.raises(UserError, match="takes pictures only"):
            build_request(video.items["clip"], engine.prompts, SamplingParams(), video.folder / "inputs")

    run_engine(1, config_for(mistral), pictures_only)


def test_fewer_frames_are_fewer_tokens(video: Case) -> None:
    def work(engine: Engine) -> Any:
        entry, folder = video.items["clip"], video.folder / "inputs"
        requests = [
            build_request({**entry, "id": str(n)}, engine.prompts, SamplingParams(max_new_tokens=2), folder, n)
            for n in (1, 3, 6)
        ]
        counts = [len(request.prompt.image_positions) for request in requests]
        assert all(output.error is None for output in answers(engine, requests).values())
        return counts

    per_frame = json.loads((video.checkpoint / "config.json").read_text())["video_seq_length"] // 6
    assert run_engine(1, config_for(video), work) == [per_frame, 3 * per_frame, 6 * per_frame]
