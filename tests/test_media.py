"""Media, data files and mixes of sources: real files written here, read through the one reader and the scripts' own command lines."""

import collections
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

import config
import data
import evaluate
import media
import model as M
import report
from results import sheet
from results.sheet import contact_sheet
import stages

ROOT = Path(__file__).resolve().parent.parent


def noise(size=(40, 30), seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def pixels(path) -> np.ndarray:
    return np.asarray(media.read_image(str(path))).astype(int)


@pytest.fixture
def limits(monkeypatch):
    """Media limits of this test alone."""
    monkeypatch.setattr(media, "limits", config.Data())
    return media.limits


# --------------------------------------------------------------------------------------------------------- one image


@pytest.mark.parametrize("suffix, options", [("png", {}), ("bmp", {}), ("tiff", {}), ("ppm", {}), ("webp", {"lossless": True})])
def test_what_is_stored_without_loss_is_read_to_the_pixel(tmp_path, suffix, options):
    noise().save(tmp_path / f"a.{suffix}", **options)
    assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), np.asarray(noise()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_shows_the_picture_upright(tmp_path, orientation):
    """EXIF: where row 0 and column 0 of the stored picture are in the upright one. The stored one is made from that by array arithmetic."""
    upright = np.asarray(noise((6, 4)))
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1),
              7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    alpha = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40), np.uint8))
    picture = noise().convert(mode)
    picture.putalpha(alpha)
    picture.save(tmp_path / "a.png")
    a = np.asarray(alpha)[..., None] / 255
    assert np.abs(pixels(tmp_path / "a.png") - (np.asarray(picture.convert("RGB")) * a + 255 * (1 - a))).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_transparent_palette_entry_becomes_white_and_the_others_stay(tmp_path, suffix):
    picture = Image.new("P", (4, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    picture.putdata([0, 1, 2, 3])
    picture.save(tmp_path / f"a.{suffix}", transparency=1)
    assert pixels(tmp_path / f"a.{suffix}").tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255], [9, 9, 9]]]


def test_a_transparent_colour_of_a_png_without_alpha_becomes_white(tmp_path):
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (4, 5, 6))
    picture.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "a.png").tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_keep_their_upper_eight(tmp_path, suffix):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), np.repeat((values // 256)[..., None], 3, 2))


def test_grey_bilevel_and_cmyk_are_read(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "l.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "1.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    for name, colour in (("l.png", [77] * 3), ("1.png", [255] * 3), ("cmyk.jpg", [255, 0, 0])):
        assert np.abs(pixels(tmp_path / name) - colour).max() <= 3, name


@pytest.mark.parametrize("size", [(640, 480), (512, 512), (513, 512), (1000, 10), (7, 1300), (3000, 2000), (40, 30)])
@pytest.mark.parametrize("most", [512 * 512, 5000])
def test_no_picture_has_more_pixels_than_allowed_and_its_shape_is_kept(tmp_path, limits, size, most):
    limits.max_pixels = most
    Image.new("L", size).save(tmp_path / "a.png")
    width, height = media.read_image(str(tmp_path / "a.png")).size
    if size[0] * size[1] <= most:
        assert (width, height) == size
    else:
        assert width * height <= most and (width + 1) * (height + 1) * max(size) / min(size) > 0.9 * most
        exact = [side * math.sqrt(most / (size[0] * size[1])) for side in size]
        assert exact[0] - width < 1 and exact[1] - height < 1


def test_the_limit_reaches_the_models_patches(tiny, tmp_path, limits):
    noise((128, 128)).save(tmp_path / "a.png")
    for most, patches in ((64 * 64, 64), (32 * 32, 16)):
        limits.max_pixels = most
        assert M.encode_media(tiny[1], {"type": "image", "image": str(tmp_path / "a.png")})[0].shape[0] == patches


def test_a_picture_that_was_written_anew_is_read_anew_by_every_processor(tiny, tmp_path):
    file, model_path = tmp_path / "a.png", str(ROOT / "configs" / "small-base")
    seen = lambda processor: M.encode_media(processor, {"type": "image", "image": str(file)})[0].mean().item()
    other = M.load(model_path)[1]
    Image.new("RGB", (32, 32), "black").save(file)
    os.utime(file, (1, 1))
    black = seen(tiny[1])
    Image.new("RGB", (32, 32), "white").save(file)
    assert seen(tiny[1]) == seen(other) > black
    assert other.patches is M.load(model_path)[1].patches  # the next stage finds what this one has read


def test_a_clip_that_was_written_anew_is_read_anew(tiny, tmp_path):
    file = tmp_path / "a.gif"
    Image.new("RGB", (32, 32), "black").save(file)
    os.utime(file, (1, 1))
    (clip,) = media.fit_clips([str(file)])
    seen = lambda: (media.read_image(clip[0]).getpixel((0, 0))[0], M.encode_media(tiny[1], {"type": "video", "video": clip})[0].mean().item())
    black = seen()
    Image.new("RGB", (32, 32), "white").save(file)
    white = seen()
    assert black[0] == 0 and white[0] == 255 and white[1] > black[1]


def test_judge_pairs_shows_equally_much_of_both_clips(tiny, tmp_path):
    """Else a candidate could be known by its length."""
    clips, shown = [animate(tmp_path / "a.gif", 4), animate(tmp_path / "b.gif", 6)], []
    watch = tiny[0].register_forward_pre_hook(lambda module, args, inputs: shown.append(inputs.get("video_grid_thw")), with_kwargs=True)
    evaluate.judge_pairs(*tiny, [data.Sample("", "video_generation", "a cat", clips)], orders=(False,), own=config.Evaluate(max_new_tokens=2))
    watch.remove()
    assert shown[0][:, 0].tolist() == [2, 2]  # pairs of frames


def claim(path, kind: bytes, body: bytes) -> None:
    """Rewrites a PNG's chunk of this kind, checksum included: the file claims what is not so."""
    png = path.read_bytes()
    at = png.index(kind)
    path.write_bytes(png[:at] + kind + body + PngImagePlugin._crc32(kind + body).to_bytes(4, "big") + png[at + 8 + len(body) :])


def test_a_side_that_rounding_makes_too_long_is_refused_before_an_image_processor_sees_it(tmp_path):
    Image.new("RGB", (9990, 50)).save(tmp_path / "long.png")  # 199.8 : 1, and 7237 : 36 = 201 : 1 once scaled down
    with pytest.raises(config.UserError, match="long.png: 7237 x 36 pixels once scaled down"):
        media.read_image(str(tmp_path / "long.png"))


def test_a_decompression_bomb_and_other_strange_files_are_one_line_that_names_them(tmp_path):
    Image.new("1", (8, 8)).save(tmp_path / "bomb.png")
    claim(tmp_path / "bomb.png", b"IHDR", (20_000).to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00")
    Image.new("L", (2010, 10)).save(tmp_path / "thin.png")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.html").write_text("<html></html>")
    (tmp_path / "folder.png").mkdir()
    for name in ("bomb.png", "thin.png", "float.tiff", "text.png", "empty.png", "page.html", "folder.png", "missing.png", "clip.mp4"):
        with pytest.raises(config.UserError) as error:
            media.read_image(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)
        assert ("pixels" in str(error.value)) == (name in ("bomb.png", "thin.png", "float.tiff"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_file_is_read_or_refused_but_never_a_traceback(tmp_path):
    """Every format, cut off and with bytes changed: whatever Pillow raises comes out as the one kind of error."""
    rng, refused = random.Random(0), 0
    shots = [noise((24, 16), k) for k in range(3)]
    for suffix in ("png", "gif", "webp", "jpg", "tiff", "bmp", "apng", *(["avif"] if features.check("avif") else [])):
        buffer = io.BytesIO()
        many = {"save_all": True, "append_images": shots[1:]} if suffix in ("gif", "webp", "tiff", "apng") else {}
        shots[0].save(buffer, {"jpg": "jpeg", "apng": "png"}.get(suffix, suffix), **many)
        whole = buffer.getvalue()
        for trial in range(100):
            broken = bytearray(whole[: rng.randrange(len(whole))] if trial % 2 else whole)
            for _ in range(0 if trial % 2 else 8):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            path = tmp_path / f"{trial}.{suffix}"
            path.write_bytes(broken)
            for read in (lambda: media.read_image(str(path)), lambda: [media.read_image(file) for file in media.fit_clips([str(path)])[0]]):
                try:
                    read()
                except config.UserError as error:
                    refused += str(path) in str(error)
    assert refused > 400


# ------------------------------------------------------------------------------------------------------------- videos


def colour(k: int) -> tuple:
    return (12 * k, 255 - 12 * k, 40)


def frames(count: int, size=(32, 24)) -> list:
    return [Image.new("RGB", size, colour(k)) for k in range(count)]


def animate(path, count: int, **options) -> str:
    made = frames(count)
    made[0].save(path, save_all=True, append_images=made[1:], duration=40, loop=0, **options)
    return str(path)


def shown(files: list) -> list:
    """Which frames these are, by their colour."""
    return [round(media.read_image(file).getpixel((9, 9))[0] / 12) for file in files]


@pytest.mark.parametrize("length", [*range(1, 40), 100, 299])
def test_the_frames_chosen_are_those_at_the_middle_of_equal_parts(length):
    """Second formula: the frame that is on the screen at that moment, in exact fractions."""
    for count in (1, 2, 3, 4, 7, 8, 16):
        times = [(Fraction(k) + Fraction(1, 2)) * Fraction(length, count) for k in range(count)]
        assert media.spread(length, count) == [max(f for f in range(length) if f <= time) for time in times]
        assert length != count or media.spread(length, count) == list(range(length))
        chosen = media.spread(length, count)
        assert all(length - 1 - f in (g, g - 1, g + 1) for f, g in zip(chosen, chosen[::-1])), "neither end is preferred"


@pytest.mark.parametrize("name, options", [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {}), ("a.tiff", {})])
@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_an_animation_is_sampled_evenly(tmp_path, name, options, count):
    (files,) = media.fit_clips([animate(tmp_path / name, count, **options)])
    assert shown(files) == media.spread(count, min(8, count))


def test_an_animation_given_as_an_image_is_its_first_frame(tmp_path):
    assert shown([animate(tmp_path / "a.gif", 5)]) == [0]


def test_a_folder_of_frames_is_read_by_number_and_hidden_files_are_left_out(tmp_path):
    for k, frame in enumerate(frames(12)):
        frame.save(tmp_path / f"frame_{k}.png")  # frame_10 would stand before frame_2
    (tmp_path / ".DS_Store").write_text("x")
    (files,) = media.fit_clips([str(tmp_path)], 12)
    assert shown(files) == list(range(12)) and all(Path(file).is_file() for file in files)
    assert shown(media.fit_clips([str(tmp_path)])[0]) == media.spread(12, 8)


def test_the_frames_of_a_list_keep_the_order_they_are_given_in(tmp_path):
    files = [f"{k}.png" for k in (3, 1, 2)]
    assert media.fit_clips([files]) == [files]


@pytest.mark.parametrize("lengths, expected", [((4, 4), 4), ((3, 3), 3), ((5, 5), 4), ((16, 16), 4), ((2, 9), 4), ((2, 3), 3), ((1, 1), 1), ((16,), 8), ((5,), 5)])
def test_a_pair_of_videos_is_capped_together_and_shown_with_equally_many_frames(tmp_path, lengths, expected):
    clips = [[f"{name}{k}.png" for k in range(length)] for name, length in zip("ab", lengths)]
    files = [animate(tmp_path / f"{name}.gif", length) for name, length in zip("ab", lengths)]
    if 1 in lengths:  # a list of one is the file itself
        clips = files
    for given in (clips, files):
        made = media.fit_clips(given)
        assert [len(clip) for clip in made] == [expected] * len(lengths)
    assert [shown(clip) for clip in made] == [media.spread(length, expected) for length in lengths]
    assert len(media.fit_clips(files, 16, 32)[0]) == min(16, max(lengths))


def test_a_clip_file_gives_the_patches_of_its_frames(tiny, tmp_path):
    """The temporal patches of a GIF are those of its frames as single files: the path needs no video processor."""
    files = []
    for k, frame in enumerate(frames(5)):
        frame.save(tmp_path / f"{k}.png")
        files.append(str(tmp_path / f"{k}.png"))
    clip = animate(tmp_path / "a.gif", 5)
    expected = M.encode_media(tiny[1], {"type": "video", "video": files})
    for video in (clip, [clip], media.fit_clips([clip])[0], files):
        patches, grid = M.encode_media(tiny[1], {"type": "video", "video": media.fit_clips([video])[0]})
        assert torch.equal(patches, expected[0]) and torch.equal(grid, expected[1])


def test_an_animation_without_end_and_one_that_lies_about_its_length_are_refused(tmp_path, monkeypatch):
    clip = animate(tmp_path / "long.gif", 12)
    monkeypatch.setattr(media, "MAX_FRAMES", 10)
    with pytest.raises(config.UserError, match="long.gif.*more than 10 frames"):
        media.fit_clips([clip])
    monkeypatch.undo()
    animate(tmp_path / "liar.png", 3)
    claim(tmp_path / "liar.png", b"acTL", (2**31 - 1).to_bytes(4, "big") + bytes(4))
    with pytest.raises(config.UserError, match="liar.png"):
        media.fit_clips([str(tmp_path / "liar.png")])


def test_videos_without_frames_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no video")
    for clip, said in (([], "no frames"), (str(tmp_path / "empty"), "no frames"), (str(tmp_path / "none.gif"), "none.gif"), (str(tmp_path / "notes.txt"), "notes.txt")):
        with pytest.raises(config.UserError, match=said):
            media.fit_clips([clip])


def test_without_pyav_a_video_file_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # what Python itself puts there to make an import fail
    with pytest.raises(config.UserError, match=r"a\.mp4: .*pip install av"):
        media.fit_clips([str(tmp_path / "a.mp4")])


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_a_video_file_is_sampled_evenly(tmp_path, name, codec):
    av = pytest.importorskip("av", reason="PyAV is optional and not installed: pip install av")
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(21):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 12 * k, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    (files,) = media.fit_clips([str(tmp_path / name)])
    assert shown(files) == media.spread(21, 8)
    with pytest.raises(config.UserError, match="a video where an image belongs"):
        media.read_image(str(tmp_path / name))
    (tmp_path / f"cut-{name}").write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(config.UserError, match=f"cut-{name}"):
        media.fit_clips([str(tmp_path / f"cut-{name}")])


def test_a_video_file_without_pictures_is_one_line(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is optional and not installed: pip install av")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(config.UserError, match="sound.mp4|no frames"):
        media.fit_clips([str(tmp_path / "sound.mp4")])


# ---------------------------------------------------------------------------------------------------- rows, good and bad


@pytest.fixture
def folder(tmp_path) -> Path:
    """Media of all kinds beside a data file of one's own."""
    for k in range(2):
        noise(seed=k).save(tmp_path / f"{k}.png")
        animate(tmp_path / f"clip{k}.gif", 12 - k)
    (tmp_path / "frames").mkdir()
    for k, frame in enumerate(frames(6)):
        frame.save(tmp_path / "frames" / f"{k}.jpg")
    return tmp_path


def pairs() -> list:
    """One good row of every task and of every way to name a video."""
    return [
        {"id": "a", "task": "image_generation", "prompt": "a cat", "media": ["0.png", "1.png"], "label": 1},
        {"id": "b", "task": "video_generation", "prompt": "a dog runs", "media": ["clip0.gif", "clip1.gif"], "label": 2},
        {"id": "c", "task": "image_understanding", "prompt": "What is it?", "media": ["0.png"], "answers": ["a cat", "a dog"], "label": 2},
        {"id": "d", "task": "video_understanding", "prompt": "What happens?", "media": ["frames"], "answers": ["rain", "snow"], "label": 1},
        {"id": "e", "task": "video_understanding", "prompt": "And here?", "media": [["frames/0.jpg", "frames/3.jpg"]], "answers": ["sun", "é漢"], "label": 1},
    ]


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def stage(out: Path, **own) -> list:
    """The data stage on these settings: what each split then holds."""
    few = {"distill_pairs": 1, "pool_pairs": 1, "test_pairs": 1, "heldout_pairs": 1, "tie_pairs": 1} if own else {}
    settings = config.load_settings("smoke", [(f"data.{key}", str(value)) for key, value in (few | own).items()])
    out.mkdir(exist_ok=True)
    data.run("data", settings, out)
    return {file.stem: data.read_samples(file) for file in out.glob("*.jsonl")}


def test_rows_of_ones_own_become_the_pool_with_videos_as_frames(folder, tiny):
    made = stage(folder / "run", pool=write(folder / "pairs.jsonl", pairs()))["pool"]
    assert [sample.id.split("-")[-1] for sample in made] == list("abcde") and len({sample.id for sample in made}) == 5
    assert [(s.task, s.prompt, s.label, s.answers) for s in made] == [(r["task"], r["prompt"], r["label"], r.get("answers", [])) for r in pairs()]
    assert [[len(item) if isinstance(item, list) else 1 for item in sample.media] for sample in made] == [[1, 1], [4, 4], [1], [6], [2]]
    assert [shown(clip) for clip in made[1].media] == [media.spread(12, 4), media.spread(11, 4)]
    for sample in made:  # and the model can read every one of them, in both orders
        for one in (sample, sample.swapped()):
            assert len(M.encode(tiny[1], tiny[0], data.build_prompt(one, "think"))["ids"]) > 10


def test_a_run_folder_moves_with_media_named_by_their_frames(folder):
    made = stage(folder / "run", pool=write(folder / "pairs.jsonl", pairs()))["pool"]
    (folder / "deeper").mkdir()
    for name in ("run", "clip0.gif", "clip1.gif"):
        (folder / name).rename(folder / "deeper" / name)
    again = data.read_samples(folder / "deeper" / "run" / "pool.jsonl")
    assert shown(again[1].media[0]) == media.spread(12, 4) and made[1].media[0] != again[1].media[0]


def test_frames_of_a_video_and_pixels_are_settings(folder):
    made = stage(folder / "run", pool=write(folder / "pairs.jsonl", pairs()), frames=3, pair_frames=4)["pool"]
    assert [len(s.media[0]) for s in made if s.task.startswith("video")] == [2, 3, 2]
    assert len(stage(folder / "run", pool=folder / "pairs.jsonl", frames=16, pair_frames=24)["pool"][1].media[0]) == 12


def test_relative_media_are_found_in_the_image_root(folder, tmp_path):
    (folder / "elsewhere").mkdir()
    rows = write(folder / "elsewhere" / "pairs.jsonl", pairs())
    with pytest.raises(config.UserError, match=r"elsewhere.*line 1.*0.png"):
        stage(folder / "run", pool=rows)
    assert len(stage(folder / "run", pool=rows, image_root=folder)["pool"]) == 5


BAD = {  # what is wrong: (row, what the message says)
    "missing file": (pairs()[0] | {"media": ["0.png", "nowhere.png"]}, "nowhere.png"),
    "unreadable image": (pairs()[2] | {"media": ["text.png"]}, "text.png"),
    "video without frames": (pairs()[3] | {"media": ["empty"]}, "no frames"),
    "video of no list": (pairs()[3] | {"media": [[]]}, "no frames"),
    "frames of two sizes": (pairs()[4] | {"media": [["frames/0.jpg", "0.png"]]}, "differ in size"),
    "label 3": (pairs()[0] | {"label": 3}, "label .* is 3"),
    "label true": (pairs()[0] | {"label": True}, "label .* is True"),
    "label as text": (pairs()[0] | {"label": "1"}, "label .* is '1'"),
    "a tie where there are none": (pairs()[2] | {"label": 0}, "label .* is 0"),
    "no label": ({key: value for key, value in pairs()[0].items() if key != "label"}, "label .* is None"),
    "a verdict that is none": ({"problem": "?", "solution": "<answer>Image 3 is better</answer>", "images": ["0.png", "1.png"]}, "verdict"),
    "empty answer": (pairs()[2] | {"answers": ["a cat", " \n"]}, "answers"),
    "one answer": (pairs()[2] | {"answers": ["a cat"]}, "answers"),
    "answers as text": (pairs()[2] | {"answers": "ab"}, "TypeError"),
    "empty prompt": (pairs()[0] | {"prompt": ""}, "prompt is empty"),
    "no prompt": ({key: value for key, value in pairs()[0].items() if key != "prompt"}, "prompt is empty"),
    "unknown task": (pairs()[0] | {"task": "image_genration"}, "unknown task 'image_genration'"),
    "no task": ({"prompt": "a cat", "media": ["0.png", "1.png"], "label": 1}, "no task"),
    "one candidate": (pairs()[0] | {"media": ["0.png"]}, "1 media"),
    "three candidates": (pairs()[0] | {"media": ["0.png", "1.png", "0.png"]}, "3 media"),
    "frames where an image belongs": (pairs()[0] | {"media": [["0.png"], ["1.png"]]}, "TypeError"),
    "odd frames for two videos": ({"problem": "?", "solution": "<answer>Video 1 is better</answer>", "images": ["0.png", "1.png", "0.png"]}, "3 frames"),
    "broken JSON": ('{"id": "x", ', "JSON"),
    "no object": ('"text"', "AttributeError"),
    "half an emoji": (pairs()[2] | {"answers": ["a cat", "\ud83d"]}, "UnicodeEncodeError"),
    "nested too deep": ('{"a": ' + "[" * 5000, "RecursionError"),
    "an impossible path": (pairs()[1] | {"media": ["x" * 5000, "clip1.gif"]}, "OSError"),
    "the second video empty": (pairs()[1] | {"media": ["clip0.gif", "empty"]}, "video 2, .*empty, has no frames"),
}


@pytest.fixture
def bad_folder(folder) -> Path:
    (folder / "text.png").write_text("no picture")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_with_its_file_and_line(bad_folder, name):
    row, said = BAD[name]
    write(bad_folder / "pairs.jsonl", [pairs()[0], "", row, pairs()[1]])  # a blank line counts as a line
    with pytest.raises(config.UserError, match=rf"1 bad rows.*pairs\.jsonl, line 3: .*{said}") as error:
        stage(bad_folder / "run", pool=bad_folder / "pairs.jsonl")
    assert "\n" not in str(error.value) and not (bad_folder / "run" / "pool.jsonl").exists()


def test_bad_rows_are_all_listed_counted_and_left_out_when_asked(bad_folder, capsys):
    rows, lines = [], {}
    for k, (row, said) in enumerate(BAD.values()):
        lines[len(rows) + 1] = said
        rows += [row, pairs()[k % 5]]
    write(bad_folder / "pairs.jsonl", rows)
    made = stage(bad_folder / "run", pool=bad_folder / "pairs.jsonl", on_error="skip")["pool"]
    assert [sample.prompt for sample in made] == [pairs()[k % 5]["prompt"] for k in range(len(BAD))]
    printed = [line for line in capsys.readouterr().out.splitlines() if "bad row:" in line]
    assert [int(line.split(", line ")[1].split(":")[0]) for line in printed] == list(lines)
    assert all(said.split(" .*")[0] in line for said, line in zip(lines.values(), printed))


def test_the_count_of_bad_rows_and_ties_is_printed_and_ties_are_left_out(bad_folder, capsys):
    tie = pairs()[0] | {"label": 0}
    write(bad_folder / "pairs.jsonl", [tie, *pairs(), BAD["label 3"][0], tie])
    made = stage(bad_folder / "run", test=bad_folder / "pairs.jsonl", on_error="skip")
    assert len(made["test"]) == 5 and all(sample.label for sample in made["test"])
    assert "1 bad rows, 2 ties" in capsys.readouterr().out
    with pytest.raises(config.UserError, match="0 pairs, 0 bad rows"):
        stage(bad_folder / "run", test=write(bad_folder / "ties.jsonl", [tie]))


def test_a_mistake_in_a_source_is_one_line_of_the_command(bad_folder, monkeypatch, capsys, limits):
    write(bad_folder / "pairs.jsonl", [pairs()[0], BAD["missing file"][0]])
    for source, said in ((bad_folder / "pairs.jsonl", "pairs.jsonl, line 2"), (f"{bad_folder / 'pairs.jsonl'}@frist:3", "PATH@first:N"), (bad_folder / "none.json", "none.json")):
        monkeypatch.setattr(sys, "argv", ["data.py", "--config", "smoke", "--out", str(bad_folder / "run"), "--data.distill_pairs", "1", "--data.pool", str(source)])
        with pytest.raises(SystemExit) as stopped:
            stages.main("data")
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and said in printed and len(printed.strip().splitlines()) == 1
    assert media.limits.distill_pairs == 1, "the run's own limits hold where media are read"


# -------------------------------------------------------------------------------------------------------- official files


def official() -> list:
    """All four tasks in the released GRPO and SFT layouts, as they are: no task, no parts, videos as frames of one flat list."""
    verdicts = [("Image 2 is better", ["0.png", "1.png"]), ("Video 1 is better", [f"frames/{k}.jpg" for k in range(6)] * 2),
                ("Answer 2 is better", ["0.png"]), ("Answer 1 is better", [f"frames/{k}.jpg" for k in range(6)] * 3)]
    grpo = [{"problem": "<image>" * len(files) + "Which is better?", "solution": f"<answer>{text}</answer>", "images": files} for text, files in verdicts]
    return grpo + [{"conversations": [{"from": "human", "value": row["problem"]}, {"from": "gpt", "value": f"<think>x</think>\n{row['solution']}"}],
                    "images": row["images"]} for row in grpo]


def test_official_files_can_be_sources(folder):
    (folder / "official.json").write_text(json.dumps(official(), indent=1))
    made = stage(folder / "run", pool=folder / "official.json", test=f"{folder / 'official.json'}@first:4")
    assert [s.task for s in made["pool"]] == list(data.TASKS[:2] + data.TASKS[2:]) * 2 and [s.label for s in made["pool"]] == [2, 1, 2, 1] * 2
    assert [[len(item) if isinstance(item, list) else 1 for item in s.media] for s in made["pool"][:4]] == [[1, 1], [4, 4], [1], [8]]
    for sample in made["pool"]:
        assert data.build_prompt(sample, "think")[-1]["text"] == "Which is better?"
    assert len(made["test"]) == 4 and len({s.id for s in made["pool"]}) == 8


def test_a_clip_is_a_clip_whatever_its_folder_is_called_and_whatever_else_a_row_says(folder):
    """An official row's GIF is no image because it is one file, nor one frame because of a # in its name; further columns are nobody's scores."""
    (folder / "se#t").mkdir()
    (folder / "clip0.gif").rename(folder / "se#t" / "take #1.gif")
    row = {"problem": "<video>What moves?", "solution": "<answer>Answer 1 is better</answer>", "images": ["se#t/take #1.gif"]}
    extra = pairs()[2] | {"scores": [0.2, 0.8], "reasons": "none", "response": ["x"]}
    made = stage(folder / "run", pool=write(folder / "rows.jsonl", [row, row | {"images": "se#t/take #1.gif"}, extra]))["pool"]
    assert [(s.task, len(s.media[0])) for s in made[:2]] == [("video_understanding", 8)] * 2
    assert made[2].swapped().answers == extra["answers"][::-1] and not made[2].scores


def test_the_frames_of_one_video_are_not_taken_for_several_videos(folder):
    row = next(row for row in pairs() if row["task"] == "video_understanding")
    rows = [row | {"media": ["clip0.gif"]}, row | {"media": ["clip0.gif", "clip1.gif"]}]
    with pytest.raises(config.UserError, match=r"rows\.jsonl, line 2: .*2 media; video_understanding has one, whose frames are a list in the list: \[\[\.\.\.\]\]"):
        stage(folder / "run", pool=write(folder / "rows.jsonl", rows))


def test_an_official_row_of_pictures_alone_has_no_prompt(folder):
    row = {"problem": "<image><image>", "solution": "<answer>Image 1 is better</answer>", "images": ["0.png", "1.png"]}
    with pytest.raises(config.UserError, match="the prompt is empty"):
        stage(folder / "run", pool=write(folder / "rows.jsonl", [row]))


def test_a_frame_that_is_changed_is_not_the_one_that_is_kept(folder):
    frame = media.read_image(f"{folder / 'clip0.gif'}#1of2")
    size = frame.size
    frame.thumbnail((4, 4))
    assert media.read_image(f"{folder / 'clip0.gif'}#1of2").size == size != frame.size


def test_a_bad_row_of_a_json_list_is_named_by_its_place_in_it(folder):
    rows = official()
    rows[2]["images"] = ["nowhere.png"]
    (folder / "official.json").write_text(json.dumps(rows, indent=1))
    with pytest.raises(config.UserError, match=r"official\.json, row 3: .*nowhere\.png"):
        stage(folder / "run", pool=folder / "official.json")
    (folder / "official.json").write_text('[\n {"problem": "?"},\n {"problem": \n]')
    with pytest.raises(config.UserError, match=r"official\.json.*line 4"):
        stage(folder / "run", pool=folder / "official.json")


# ----------------------------------------------------------------------------------------------------------------- mixes


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10, 99, 100, 101])
def test_strategies_take_what_brute_force_takes(length):
    rows = list(range(length))
    pick = lambda strategy, seed=0: data.pick(rows, strategy, random.Random(seed))
    assert pick("all") == rows
    for n in (0, 1, 2, 5, 99, 100, 1000):
        assert pick(f"first:{n}") == [row for row in rows if row < n] and pick(f"end:{n}") == [row for row in rows if row >= length - n]
        drawn = pick(f"random:{n}")
        assert len(drawn) == min(n, length) and drawn == sorted(set(drawn)) and set(drawn) <= set(rows) and drawn == pick(f"random:{n}")
    for n in (0, 1, 10, 33, 50, 100, 200):
        fewest = next(k for k in range(3 * length + 1) if 100 * k >= n * length)  # rounded up
        assert len(pick(f"{n}%")) == min(fewest, length) and pick(f"{n}%") == sorted(set(pick(f"{n}%")))


def test_random_draws_every_row_equally_often():
    counts = collections.Counter(row for seed in range(4000) for row in data.pick(list(range(8)), "random:2", random.Random(seed)))
    assert sum((counts[row] - 1000) ** 2 / 1000 for row in range(8)) < 24.3  # chi squared, 7 degrees of freedom: one in a thousand


def test_a_mix_is_its_sources_one_after_the_other(folder):
    rows = lambda name, count: write(folder / name, [pairs()[0] | {"id": f"{name}{k}", "prompt": f"{name} {k}"} for k in range(count)])
    one, two = rows("one@home.jsonl", 6), rows("two.jsonl", 10)
    said = lambda source, **own: [s.prompt for s in stage(folder / "run", pool=source, **own)["pool"]]
    names = lambda name, numbers: [f"{name} {k}" for k in numbers]
    assert said(f"{one}@first:2, {two}@end:3") == names("one@home.jsonl", [0, 1]) + names("two.jsonl", [7, 8, 9])
    assert said(f"{two},\n  {one}@all,") == names("two.jsonl", range(10)) + names("one@home.jsonl", range(6))
    drawn = said(f"{two}@30%, {one}@random:2")
    assert len(drawn) == 5 and drawn == said(f"{two}@30%, {one}@random:2") and all(prompt.startswith("two") for prompt in drawn[:3])
    by_seed = said(f"{two}@random:5")
    data.run("data", config.load_settings("smoke", [("data.pool", f"{two}@random:5"), ("run.seed", "2")]), folder / "run")
    assert [s.prompt for s in data.read_samples(folder / "run" / "pool.jsonl")] != by_seed
    other = [stage(folder / "run", pool=f"{two}@50%", distill=f"{two}@50%")[split] for split in ("pool", "distill")]
    assert len(other[0]) == len(other[1]) == 5
    repeated = stage(folder / "run", pool=f"{one}, {one}")["pool"]
    assert len(repeated) == 12 and len({s.id for s in repeated}) == 12, "judgements are kept by id"


def test_what_has_no_source_is_drawn_as_before_and_said(folder, tmp_path, capsys):
    without = stage(folder / "without")
    assert "small world" not in capsys.readouterr().out
    assert {split: len(samples) for split, samples in without.items()} == {"distill": 24, "pool": 24, "test": 16, "heldout": 8, "ties": 6}
    source = write(folder / "pairs.jsonl", pairs())
    with_pool = stage(folder / "pool", pool=source)
    assert re.findall(r"(\w+): data.(\w+) names no files", capsys.readouterr().out) == [("distill", "distill"), ("test", "test")]
    assert {split: len(samples) for split, samples in with_pool.items()} == {"distill": 1, "pool": 5, "test": 4, "heldout": 4, "ties": 2}
    assert with_pool["distill"][0].prompt == without["distill"][0].prompt, "the same drawing as without the source"
    assert set(stage(folder / "test", test=source)) == {"distill", "pool", "test"}


def test_test_pairs_that_are_learnt_from_are_counted_in_whatever_order_they_stand(folder, capsys):
    turned = pairs()[0] | {"id": "z", "media": pairs()[0]["media"][::-1], "label": 2}
    learnt, tested = write(folder / "learnt.jsonl", pairs()[:3]), write(folder / "tested.jsonl", [turned, *pairs()[2:4]])
    stage(folder / "run", distill=learnt, pool=learnt, test=tested)
    assert "   test: 2 of its pairs are learnt from, too\n" in capsys.readouterr().out


def test_a_checkpoint_of_a_run_is_shown_what_it_was_shown_there_unless_flags_say_otherwise(folder, limits):
    import argparse
    import evaluate

    shown = lambda **given: (evaluate.settings_of(folder / "run", argparse.Namespace(**given)).evaluate.max_new_tokens, media.limits.max_pixels, media.limits.frames)
    assert shown() == (2048, 512 * 512, 8)
    for name, values in (("data", {"max_pixels": 5000, "frames": 3}), ("evaluate", {"max_new_tokens": 77})):
        (folder / "run" / name).mkdir(parents=True)
        (folder / "run" / name / "done.json").write_text(json.dumps({"id": name, "settings": {name: values}}))
    assert shown() == (77, 5000, 3) and shown(max_pixels=None, frames=4, max_new_tokens=5) == (5, 5000, 4)
    with pytest.raises(config.UserError, match="--pair-frames is 1 or more"):
        shown(pair_frames=0)


def test_a_run_on_ones_own_test_is_evaluated_without_the_small_worlds_splits(folder, tiny):
    """Every checkpoint is judged on the tasks that are there; the table and the report cope with those that are not."""
    import evaluate

    rows = [pairs()[0], pairs()[2], pairs()[0] | {"id": "f"}]
    source = write(folder / "pairs.jsonl", rows)
    M.save(*tiny, folder / "base")
    settings = config.load_settings("smoke", [("data.test", str(source)), ("model.path", str(folder / "base")), ("evaluate.max_new_tokens", "8")])
    out = folder / "run"
    (out / "data").mkdir(parents=True)
    data.run("data", settings, out / "data")
    results = [{"name": mode, "stage": "base", "mode": mode} | evaluate.judge_checkpoint("base", mode, settings, out) for mode in ("answer", "think")]
    for row in results:
        assert {scope: cell["pairs"] for scope, cell in row["splits"]["test"].items()} == {"image_generation": 2, "image_understanding": 1, "all": 3}
        assert row["splits"]["heldout"] == {} and row["ties"] == {}
    table = evaluate.table(results)
    assert "on the test split" in table and "orders agree" in table and "never trained on" not in table and "ties" not in table
    assert report.write(out).stat().st_size > 10_000


# --------------------------------------------------------------------------------------------------------------- inspect


def counts(printed: str) -> dict:
    return {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split() and line.split()[0] in data.TASKS}


def test_inspect_counts_and_draws_a_file_of_ones_own(bad_folder):
    rows = [*pairs(), pairs()[0] | {"prompt": "a much longer caption", "label": 2}, BAD["missing file"][0], pairs()[0] | {"label": 0, "prompt": "xy"}]
    write(bad_folder / "pairs.jsonl", rows)
    done = subprocess.run([sys.executable, "data.py", "inspect", bad_folder / "pairs.jsonl", "--sheet", bad_folder / "sheet.png"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7 pairs, 1 bad rows" in done.stdout and f"{bad_folder / 'pairs.jsonl'}, line 7: cannot read {bad_folder / 'nowhere.png'}" in done.stdout
    assert counts(done.stdout) == {
        "image_generation": ["3", "1", "1", "1", "5", "21", "-", "-"],  # pairs, first, second, ties, median and longest prompt, and answer
        "video_generation": ["1", "0", "1", "0", "10", "10", "-", "-"],
        "image_understanding": ["1", "0", "1", "0", "11", "11", "5", "5"],
        "video_understanding": ["2", "2", "0", "0", "13", "13", "4", "4"],
    }
    with Image.open(bad_folder / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width == 960
        pictures = np.asarray(sheet.convert("RGB"))
    frame = np.array(colour(media.spread(6, 6)[2]))  # some frame of a strip is on the sheet, in its colour
    assert (np.abs(pictures.astype(int) - frame).max(2) <= 3).sum() > 500


def test_the_sheet_shows_both_candidates_side_by_side_and_text_under_them(tmp_path):
    for name, fill in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (100, 80), fill).save(tmp_path / f"{name}.png")
    sample = data.Sample("x", "image_generation", "a caption " * 30, [str(tmp_path / "red.png"), str(tmp_path / "blue.png")], label=1)
    contact_sheet([sample, sample.swapped()], str(tmp_path / "sheet.png"))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    where = lambda fill, rows: np.argwhere((sheet[rows] == fill).all(2))
    half = slice(0, sheet.shape[0] // 2)
    red, blue = where((255, 0, 0), half), where((0, 0, 255), half)
    assert red[:, 1].max() < 480 <= blue[:, 1].min() and set(red[:, 0]) == set(blue[:, 0]), "the first pair: red on the left"
    second = slice(sheet.shape[0] // 2, None)
    assert where((0, 0, 255), second)[:, 1].max() < 480 <= where((255, 0, 0), second)[:, 1].min(), "the second: swapped"
    assert (sheet[red[:, 0].max() + 2 : half.stop].sum(2) < 200).sum() > 200, "dark text under the pictures"


def test_inspect_reads_official_files_and_a_run(folder, world, capsys):
    (folder / "official.json").write_text(json.dumps(official()))
    sheet.inspect([str(folder / "official.json"), "--sheet", str(folder / "sheet.png")])
    printed = capsys.readouterr().out
    assert "8 pairs, 0 bad rows" in printed and {task: row[:4] for task, row in counts(printed).items()} == {
        "image_generation": ["2", "0", "2", "0"], "video_generation": ["2", "2", "0", "0"], "image_understanding": ["2", "0", "2", "0"], "video_understanding": ["2", "2", "0", "0"]}
    sheet.inspect([str(world / "pairs.jsonl"), "--sheet", str(folder / "small.png")])
    assert "12 pairs, 0 bad rows" in capsys.readouterr().out and (folder / "small.png").is_file()


def test_inspect_finds_media_in_the_image_root_and_says_what_it_takes(folder, capsys, monkeypatch):
    (folder / "elsewhere").mkdir()
    rows = str(write(folder / "elsewhere" / "pairs.jsonl", pairs()))
    for root, said in (([], "0 pairs, 5 bad rows"), (["--image-root", str(folder), "--sheet", str(folder / "s.png")], "5 pairs, 0 bad rows")):
        sheet.inspect([rows, *root])
        assert said in capsys.readouterr().out
    for arguments, said in (([], "inspect PATH"), ([rows, "--sheet"], "inspect PATH"), ([rows, "--shet", "x"], "inspect PATH"), ([rows, "--sheet", str(folder / "no" / "s.png")], "that exists"), ([str(folder / "none.jsonl")], "none.jsonl")):
        monkeypatch.setattr(sys, "argv", ["data.py", "inspect", *arguments])
        with pytest.raises(SystemExit) as stopped:
            stages.main("data", {"inspect": sheet.inspect})
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and said in printed and len(printed.strip().splitlines()) == 1
